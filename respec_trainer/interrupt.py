"""End a rank at once on Ctrl-C, SIGTERM, or the death of its launcher, and leave no process behind.

Python runs signal handlers between bytecodes of the main thread, which may sit in a collective for minutes. The
interpreter's wake-up pipe is written from the C handler, so a thread that reads it acts whatever the main thread does.
"""

from __future__ import annotations

import os
import select
import signal
import threading

import psutil

POLL_SECONDS = 1.0


def end_on_signal() -> None:
    """From now on SIGINT, SIGTERM and the loss of the launcher kill this process's children, then the process."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    launcher = _ancestors()
    threading.Thread(target=_watch, args=(read, launcher), daemon=True, name="respec-interrupt").start()


def end_children() -> None:
    """Kill every descendant of this process."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def _watch(pipe: int, launcher: tuple[int, ...]) -> None:
    while True:
        ready, _, _ = select.select([pipe], [], [], POLL_SECONDS)
        numbers = set(os.read(pipe, 64)) if ready else set()
        if numbers & {signal.SIGINT, signal.SIGTERM}:
            _end(128 + min(numbers))
        if _ancestors() != launcher:
            _end(1)


def _end(status: int) -> None:
    end_children()
    os._exit(status)


def _ancestors() -> tuple[int, ...]:
    """Processes that must live for this rank to go on: its launcher and, under deepspeed, the command the user typed.

    deepspeed's per-node launcher lives on, unaware, if the user's command is killed; the ranks end the run for it. A
    rank started by hand has no launcher, and may outlive the shell it was started from.
    """
    if "RANK" not in os.environ:
        return ()
    try:
        parent = psutil.Process().parent()
        typed = (parent.ppid(),) if parent and "deepspeed.launcher.launch" in parent.cmdline() else ()
        return (parent.pid, *typed) if parent else (0,)
    except psutil.Error:
        return (0,)
