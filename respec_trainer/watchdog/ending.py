"""The end of a run on one host: one rank prints the reason, stuck processes are killed. And facts about this rank."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from respec_trainer.processes import kill_tree
from respec_trainer.watchdog.messages import MOST_CHARACTERS, Process

FRAMES_SHOWN = 30


class Reporter:
    """Selects one rank on a host to print why the run ends."""

    def __init__(self, run: str):
        """`run`: text that is the same on all ranks of this run, and differs from that of other runs on this host."""
        self.name = f"\0respec-watchdog {run}"
        self.claim: socket.socket | None = None

    def is_me(self) -> bool:
        """Return whether this rank is the first on this host that called this method, while its process lives."""
        if self.claim is None:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(self.name)  # an abstract address: it has no file, and ends with the process
            except OSError:
                claim.close()
                return False
            self.claim = claim
        return True


class RunningClock:
    """A clock that stops while this process is stopped, when it cannot receive messages of other ranks."""

    def __init__(self, longest: float):
        """`longest`: most seconds counted from one `tick` to the next."""
        self.longest, self.seconds, self._last = longest, 0.0, time.monotonic()

    def tick(self) -> float:
        """Advance the clock and return its seconds."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self.longest)
        self._last = now
        return self.seconds


def kill_lost(lost: Sequence[Process], me: Process) -> None:
    """Kill the processes of `lost` that are on this machine, with their children, except this process."""
    for process in lost:
        found = process.here() if process.home == me.home and process != me else None
        if found is not None:
            kill_tree(found)


def main_stack() -> tuple[str, bool]:
    """Return the stack of the main thread, the last call last, and whether it is inside a collective."""
    frame = sys._current_frames()[threading.main_thread().ident]
    frames = traceback.extract_stack(frame)[-FRAMES_SHOWN:]
    text = "".join(traceback.format_list(frames))
    return text[-MOST_CHARACTERS // 3 :], "/torch/distributed/" in frames[-1].filename


def lost_contact(error: BaseException) -> bool:
    """Return whether `error`, or its cause, only reports that another rank or its connection is gone."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or (error.__cause__ is not None and lost_contact(error.__cause__)):
        return True
    # gloo's own errors are plain RuntimeErrors that contain the position in its source.
    return type(error) is RuntimeError and "gloo/transport" in str(error)
