"""processes.py: all descendants are ended, children end with their parents, garbage collection is controlled."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from respec_trainer.processes import (
    collect_garbage_again,
    collect_no_garbage,
    descendants,
    free_all_garbage,
    kill,
    kill_and_wait,
    kill_tree,
    local_size,
    parent_death_signal,
)

FAMILY = "sleep 300 & echo $!; exec sleep 300"  # prints the number of its child
PARENT = """
import signal, subprocess, time
from respec_trainer.processes import parent_death_signal
child = subprocess.Popen(["sleep", "300"], preexec_fn=parent_death_signal(signal.SIGKILL), start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def family():
    """Start a process with one child; return it and the child's number."""
    process = subprocess.Popen(["bash", "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process, child
    for pid in (process.pid, child):
        kill([psutil.Process(pid)] if psutil.pid_exists(pid) else [])
    process.wait()
    process.stdout.close()


def test_a_tree_is_killed_with_its_root(family):
    process, child = family
    assert [found.pid for found in descendants(process.pid)] == [child]
    kill_tree(psutil.Process(process.pid))
    assert process.wait(timeout=10) == -signal.SIGKILL and gone(child)


def test_a_process_that_has_ended_has_no_descendants_and_can_be_killed_again():
    process = subprocess.Popen(["sleep", "300"])
    known = psutil.Process(process.pid)
    process.kill()
    process.wait()
    assert descendants(known) == [] and descendants(process.pid) == []
    kill([known])
    kill_tree(known)


def live(pipe) -> None:
    pipe.send(subprocess.Popen(["sleep", "300"]).pid)
    time.sleep(300)


def test_after_waiting_children_and_theirs_are_gone():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=live, args=(theirs,))
    child.start()
    grandchild = ours.recv()
    kill_and_wait([child], 10.0)
    assert child.exitcode == -signal.SIGKILL
    assert gone(grandchild, within=0)
    kill_and_wait([child], 10.0)  # a second call is no error


def test_a_process_gets_its_signal_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not gone(child, within=0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)


def test_a_process_whose_parent_was_dead_before_ends_at_once():
    """The expected parent is not the real one, as after the death of the first parent."""
    ask = parent_death_signal(signal.SIGTERM, parent=os.getppid())
    assert subprocess.Popen(["sleep", "300"], preexec_fn=ask).wait(timeout=10) == 1
    ask = parent_death_signal(signal.SIGTERM, parent=os.getpid())
    assert subprocess.Popen(["true"], preexec_fn=ask).wait(timeout=10) == 0


@pytest.fixture
def collector():
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_is_collected_again_but_not_among_what_there_was(collector):
    collect_no_garbage()
    assert not gc.isenabled()
    before = object.__new__(type("Node", (), {}))
    collect_garbage_again()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    assert all(thing is not before for thing in gc.get_objects())
    free_all_garbage()
    assert gc.get_freeze_count() == 0 and any(thing is before for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "6"}, 6),
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 3),
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "LOCAL_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "6", "LOCAL_SIZE": ""}, 6),
    ],
)
def test_the_ranks_of_a_host_are_those_that_the_launcher_says(monkeypatch, variables, size):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert local_size() == size


def test_importing_it_takes_little():
    """The module is imported before the settings that must precede the import of torch."""
    code = "import sys, respec_trainer.processes; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
