"""Writer: the background part of a save. Each rank writes its files in a thread, then rank 0 publishes them.

The threads use their own process group, because their messages would mix with those of the main threads in a common
group. They do not report errors by files in the shared folder, because on a full disk a rank could not write one.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from respec_trainer.checkpoint.files import Facts
from respec_trainer.collectives import gather
from respec_trainer.errors import CheckpointError

PATIENCE = timedelta(hours=2)  # how long a rank that has written waits for one that still writes


@dataclass(frozen=True)
class SaveTask:
    """The work of this rank for one checkpoint."""

    step: int
    partial: Path  # the folder to fill, the same on every rank
    files: Mapping[str, Callable[[Path], Facts]]  # name -> writes that file to the path it is given
    folders: Mapping[str, Callable[[Path], None]]  # name -> makes that folder
    publish: Callable[[dict[str, Facts]], None]  # given every rank's files; called on rank 0


class Writer:
    """Writes one checkpoint at a time. Every rank calls `start` and `wait` in the same order."""

    def __init__(self, rank: int, world_size: int, notify: Callable[[str], None]):
        self.rank, self.world_size, self.notify = rank, world_size, notify
        self.group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._cause: Exception | None = None  # of the error, if another rank was lost

    def start(self, task: SaveTask) -> None:
        """Begin to write. Call `wait` before."""
        assert self._thread is None, "a checkpoint is still being written"
        if self.group is None and self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        # A daemon, so that a rank that dies of another error does not wait for the thread.
        self._thread = threading.Thread(target=self._run, args=(task,), daemon=True, name="respec-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current checkpoint is published. Raises CheckpointError on every rank if that failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(error) from self._cause

    def _run(self, task: SaveTask) -> None:
        try:
            errors, self._cause = self._write(task), None
        except RuntimeError as error:  # of the process group
            errors, self._cause = [f"a rank was lost: {error}"], error
        if errors:
            self._error = (
                f"saving the checkpoint of step {task.step} failed: {errors[0]}. Earlier checkpoints are unchanged; "
                "make room, and resume from the newest with checkpoint.resume=auto"
            )
            if self.rank == 0 and self._cause is None:  # the watchdog reports a lost rank
                self.notify(self._error)

    def _write(self, task: SaveTask) -> list[str]:
        """Write and publish; return the errors of all ranks, on every rank."""
        written, error = self._attempt(lambda: self._fill(task))
        gathered = gather((written, error), self.group)
        errors = [error for _, error in gathered if error]
        if self.rank == 0 and not errors:
            merged = {name: facts for files, _ in gathered for name, facts in files.items()}
            _, error = self._attempt(lambda: task.publish(merged))
            errors = [error] if error else []
        if self.rank == 0 and errors:
            shutil.rmtree(task.partial, ignore_errors=True)  # it may fill the disk
        return gather(errors, self.group)[0]

    def _fill(self, task: SaveTask) -> dict[str, Facts]:
        for name, make in task.folders.items():
            make(task.partial / name)
        return {name: write(task.partial / name) for name, write in task.files.items()}

    def _attempt(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        try:
            return action(), None
        except OSError as error:
            return None, f"rank {self.rank}: {error.filename or 'a file'}: {error.strerror or error}"
        except Exception as error:  # of any kind: the other ranks wait for this rank's result
            return None, f"rank {self.rank}: {type(error).__name__}: {error}"
