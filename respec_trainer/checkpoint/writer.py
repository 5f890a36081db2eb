"""Writer: the part of a save that nobody waits for. Each rank writes its files in a thread, rank 0 publishes them.

The ranks' threads agree over a process group of their own: on one that the main threads use, messages would mix. A
shared folder alone would not do, for on a full disk a rank cannot even leave a word that it failed.
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

PATIENCE = timedelta(hours=2)  # of a rank that has written, for one that still writes


@dataclass(frozen=True)
class SaveTask:
    """What this rank has to do for one checkpoint."""

    step: int
    partial: Path  # the folder to fill, the same on every rank
    files: Mapping[str, Callable[[Path], Facts]]  # name -> writes that file to the path it is given
    folders: Mapping[str, Callable[[Path], None]]  # name -> makes that folder
    publish: Callable[[dict[str, Facts]], None]  # given every rank's files; called on rank 0


class Writer:
    """One checkpoint at a time. Every rank calls `start` and `wait` alike."""

    def __init__(self, rank: int, world_size: int, notify: Callable[[str], None]):
        self.rank, self.world_size, self.notify = rank, world_size, notify
        self.group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._cause: Exception | None = None  # of it, if that was no error of saving

    def start(self, job: SaveTask) -> None:
        """Begin to write. Call `wait` before."""
        assert self._thread is None, "a checkpoint is still being written"
        if self.group is None and self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        # A daemon: a rank that dies of something else must not be held up by it.
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True, name="respec-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint in flight is published. Raises CheckpointError on every rank if it could not be."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(error) from self._cause

    def _run(self, job: SaveTask) -> None:
        try:
            errors, self._cause = self._write(job), None
        except RuntimeError as error:  # of the process group
            errors, self._cause = [f"a rank was lost: {error}"], error
        if errors:
            self._error = (
                f"saving the checkpoint of step {job.step} failed: {errors[0]}. Those before it are as they were; make "
                "room, and go on from the newest with checkpoint.resume=auto"
            )
            if self.rank == 0 and self._cause is None:  # who was lost, the watchdog says
                self.notify(self._error)

    def _write(self, job: SaveTask) -> list[str]:
        """What went wrong, on any rank."""
        written, error = self._attempt(lambda: self._fill(job))
        told = gather((written, error), self.group)
        errors = [error for _, error in told if error]
        if self.rank == 0 and not errors:
            merged = {name: facts for files, _ in told for name, facts in files.items()}
            _, error = self._attempt(lambda: job.publish(merged))
            errors = [error] if error else []
        if self.rank == 0 and errors:
            shutil.rmtree(job.partial, ignore_errors=True)  # it may be what fills the disk
        return gather(errors, self.group)[0]

    def _fill(self, job: SaveTask) -> dict[str, Facts]:
        for name, make in job.folders.items():
            make(job.partial / name)
        return {name: write(job.partial / name) for name, write in job.files.items()}

    def _attempt(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        try:
            return action(), None
        except OSError as error:
            return None, f"rank {self.rank}: {error.filename or 'a file'}: {error.strerror or error}"
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            return None, f"rank {self.rank}: {type(error).__name__}: {error}"
