"""End a rank and all its processes at once on Ctrl-C, on SIGTERM, or when its launcher dies.

Python runs signal handlers between bytecodes of the main thread, which may wait in a collective for minutes. But the C
handler writes to the interpreter's wake-up pipe at once, so a thread that reads the pipe can act without the main one.
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
    """Kill this process, its children first, on SIGINT or SIGTERM and when the launcher is gone.

    `before` is called with the signal's number before any process is killed. It must return quickly.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    arguments = (read, Launcher.of_this_process(), before)
    threading.Thread(target=_watch, args=arguments, daemon=True, name="respec-interrupt").start()


def end_process(status: int) -> None:
    """Kill the descendants of this process, then end it with exit code `status`."""
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
    """The process numbers of the launcher's processes; this rank ends when one of them does. None: do not watch it.

    If the command that the user typed is killed, deepspeed's launcher on each node, the parent, does not notice it and
    runs on; so the ranks end the run. A rank started by hand has no launcher, and may outlive its shell.
    """

    parent: int | None  # of this rank
    typed: int | None  # the command that the user typed, where it is the parent's parent

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
