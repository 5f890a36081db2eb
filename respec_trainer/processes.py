"""Processes of this host: how they are ended, what they do when their parent dies, when they collect garbage.

Imports little: launchers and sglang's processes import it before anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import psutil

PR_SET_PDEATHSIG = 1  # of prctl(2)


class Killable(Protocol):
    def kill(self) -> None: ...


class Child(Killable, Protocol):
    """A process that this one started, as multiprocessing knows it."""

    pid: int

    def join(self, timeout: float | None = None) -> None: ...


def descendants(process: psutil.Process | int) -> list[psutil.Process]:
    """The children of a process, or of that of a number, their children, and so on; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        known = psutil.Process(process) if isinstance(process, int) else process
        return known.children(recursive=True)
    return []


def kill(processes: Iterable[Killable]) -> None:
    """Kill those that still live. psutil tells a process from a later one with the same number."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_tree(process: psutil.Process) -> None:
    """Kill a process and its descendants, these first."""
    kill([*descendants(process), process])


def kill_and_wait(children: Collection[Child], seconds: float) -> None:
    """Kill children of this process and their descendants, and wait until they are gone, at most `seconds`."""
    deadline = time.monotonic() + seconds
    theirs = [process for child in children for process in descendants(child.pid)]
    kill([*children, *theirs])
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    psutil.wait_procs(theirs, timeout=max(0.0, deadline - time.monotonic()))


def parent_death_signal(number: int, parent: int | None = None) -> Callable[[], None]:
    """What a new process calls so that the kernel sends it signal `number` when its parent dies, however it dies.

    With the `parent`'s process number, the new process ends at once if that one is dead already. Linux only: elsewhere
    the call does nothing. What it needs is loaded here, so that it can be called between fork and exec.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os._exit(1)

    return ask


def collect_no_garbage() -> None:
    """Collect no garbage while libraries are imported: a tenth of the start would go into looking for it in vain."""
    gc.disable()


def collect_garbage_again() -> None:
    """Collect garbage from now on, but never look at what there is now: it stays."""
    gc.freeze()
    gc.enable()


def free_all_garbage() -> None:
    """Look at everything again. Else, as the process ends, libraries complain of leaks of what they made."""
    gc.unfreeze()


def local_size() -> int:
    """The number of this job's ranks on this host; 1 where no launcher says it.

    DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; with WORLD_SIZE alone, all ranks are here.
    """
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return int(next(filter(None, map(os.environ.get, names)), "1"))
