"""interrupt.py: a rank stuck in a collective still ends at once, with its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from respec_trainer.interrupt import Launcher

# The main thread waits in C++ for a peer that never comes, as a rank does in a collective.
STUCK = """
import subprocess, sys
from datetime import timedelta
from torch.distributed import TCPStore
from respec_trainer.interrupt import end_on_signal
from respec_trainer.network import free_port
end_on_signal(lambda number: print("told of", number, flush=True))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
TCPStore("127.0.0.1", free_port(), 2, True, timedelta(seconds=600))
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(rank.pid, flush=True)
rank.wait()
"""


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_stuck_rank_and_its_children(number):
    rank = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    try:
        child = int(rank.stdout.readline())
        rank.send_signal(number)
        assert rank.wait(timeout=10) == 128 + number
        assert gone(child) and rank.stdout.read() == f"told of {int(number)}\n"
    finally:
        rank.kill()


def test_rank_lives_on_when_the_engine_hides_its_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    launcher = Launcher.of_this_process()
    monkeypatch.delenv("RANK")  # like when the engine's processes start
    assert not launcher.is_gone()


def test_rank_ends_when_its_launcher_is_killed():
    command = [sys.executable, "-c", LAUNCHER, STUCK]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RANK": "0"})
    rank = int(launcher.stdout.readline())
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    assert gone(rank) and gone(child)
