"""Processes of this host: end them, tie them to their parent, control their garbage collection.

The module imports little, because launchers and sglang's processes import it first.
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
    """A child process in the interface of multiprocessing."""

    pid: int

    def join(self, timeout: float | None = None) -> None: ...


def descendants(process: psutil.Process | int) -> list[psutil.Process]:
    """Return the children of a process (given itself or its number), their children, and so on; [] if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        known = psutil.Process(process) if isinstance(process, int) else process
        return known.children(recursive=True)
    return []


def kill(processes: Iterable[Killable]) -> None:
    """Kill the processes that still run. psutil never kills a later process that has the same number."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_tree(process: psutil.Process) -> None:
    """Kill the descendants of a process, then the process."""
    kill([*descendants(process), process])


def kill_and_wait(children: Collection[Child], seconds: float) -> None:
    """Kill children of this process and their descendants. Wait until they are gone, at most `seconds`."""
    deadline = time.monotonic() + seconds
    theirs = [process for child in children for process in descendants(child.pid)]
    kill([*children, *theirs])
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    psutil.wait_procs(theirs, timeout=max(0.0, deadline - time.monotonic()))


def parent_death_signal(number: int, parent: int | None = None) -> Callable[[], None]:
    """Return a function that a new process calls to get signal `number` from the kernel when its parent dies.

    `parent` is the parent's process number: if that process is dead already, the new process ends at once. Linux only:
    elsewhere the function does nothing. Libraries are loaded here, so it can be called between fork and exec.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl

    def request_signal() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os._exit(1)

    return request_signal


def collect_no_garbage() -> None:
    """Collect no garbage while libraries are imported: there is none, and the search takes a tenth of the start."""
    gc.disable()


def collect_garbage_again() -> None:
    """Collect garbage from now on, but not among the objects that exist now: they are needed until the end."""
    gc.freeze()
    gc.enable()


def free_all_garbage() -> None:
    """Let the last collection see all objects. Otherwise libraries report leaks when the process ends."""
    gc.unfreeze()


def local_size() -> int:
    """Return the number of this job's ranks on this host; 1 without a launcher.

    DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE. With WORLD_SIZE alone, all ranks are on this host.
    """
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return int(next(filter(None, map(os.environ.get, names)), "1"))
