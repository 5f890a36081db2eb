"""End a rank at once on Ctrl-C, SIGTERM, or the death of its launcher, and leave no process behind.

Python runs signal handlers between bytecodes of the main thread, which may sit in a collective for minutes. The
interpreter's wake-up pipe is written from the C handler, so a thread that reads it acts whatever the main thread does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from respec_trainer.processes import descendants, kill

POLL_SECONDS = 1.0


def end_on_signal(before: Callable[[int], None] = lambda number: None) -> None:
    """From now on SIGINT, SIGTERM and the loss of the launcher kill this process's children, then the process.

    `before` is called with the signal's number, before anything is killed; it must return soon.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    arguments = (read, Launcher.of_this_process(), before)
    threading.Thread(target=_watch, args=arguments, daemon=True, name="respec-interrupt").start()


def end_process(status: int) -> None:
    """End this process now with exit code `status`, its descendants first."""
    kill(descendants(os.getpid()))
    os._exit(status)


def _watch(pipe: int, launcher: Launcher, before: Callable[[int], None]) -> None:
    while True:
        ready, _, _ = select.select([pipe], [], [], POLL_SECONDS)
        numbers = set(os.read(pipe, 64)) if ready else set()
        if numbers & {signal.SIGINT, signal.SIGTERM}:
            before(min(numbers))
            end_process(128 + min(numbers))
        if launcher.is_gone():
            end_process(1)


@dataclass(frozen=True)
class Launcher:
    """The processes that must live for this rank to go on; None for those that need not.

    deepspeed's per-node launcher, the parent, lives on unaware if the command the user typed is killed; the ranks end
    the run for it. A rank started by hand has no launcher, and may outlive the shell it was started from.
    """

    parent: int | None
    typed: int | None

    @classmethod
    def of_this_process(cls) -> Launcher:
        if "RANK" not in os.environ:
            return cls(None, None)
        parent = psutil.Process(os.getppid())
        return cls(parent.pid, parent.ppid() if "deepspeed.launcher.launch" in parent.cmdline() else None)

    def is_gone(self) -> bool:
        if self.parent is None:
            return False
        try:
            return os.getppid() != self.parent or self.typed not in (None, psutil.Process(self.parent).ppid())
        except psutil.Error:
            return True
