"""How a run ends on one host: one rank speaks, what is stuck is killed. And what a rank knows of its own trouble."""

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


class Speaker:
    """Of all ranks on a host that know why the run ends, the one that says it."""

    def __init__(self, run: str):
        """`run`: what the ranks of this run, and no others on this host, have in common."""
        self.name = f"\0respec-watchdog {run}"
        self.claim: socket.socket | None = None

    def is_me(self) -> bool:
        """Whether this rank is the first that asked. It remains so until its process ends."""
        if self.claim is None:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(self.name)  # an abstract address: without a file, and gone with the process
            except OSError:
                claim.close()
                return False
            self.claim = claim
        return True


class RunningClock:
    """Seconds in which this process could run: when it was stopped itself, nobody else was silent."""

    def __init__(self, longest: float):
        """`longest`: seconds between two looks at the clock that can have been spent running."""
        self.longest, self.seconds, self._last = longest, 0.0, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, self.longest)
        self._last = now
        return self.seconds


def kill_lost(lost: Sequence[Process], me: Process) -> None:
    """Kill those of `lost`, with their children, that are other processes of this machine."""
    for process in lost:
        found = process.here() if process.home == me.home and process != me else None
        if found is not None:
            kill_tree(found)


def main_stack() -> tuple[str, bool]:
    """Where the main thread is, the last call last, and whether that is inside a collective."""
    frame = sys._current_frames()[threading.main_thread().ident]
    frames = traceback.extract_stack(frame)[-FRAMES_SHOWN:]
    text = "".join(traceback.format_list(frames))
    return text[-MOST_CHARACTERS // 3 :], "/torch/distributed/" in frames[-1].filename


def lost_contact(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says no more than that another rank or its connection is gone."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or (error.__cause__ is not None and lost_contact(error.__cause__)):
        return True
    # gloo's own errors are plain RuntimeErrors, with the place in its source.
    return type(error) is RuntimeError and "gloo/transport" in str(error)
