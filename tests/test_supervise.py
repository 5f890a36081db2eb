"""launch/supervise.py with commands that fail as planned: how often they run, and that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
# Adds a line to argv[1] for each run, leaves a process of its own session behind, and ends with the codes of argv[2],
# one for each run; "wait" sleeps.
COMMAND = """
import pathlib, subprocess, sys, time
lives, codes = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
with lives.open("a") as file:
    file.write(f"{child.pid} {time.monotonic()}\\n")
code = codes[min(len(lives.read_text().splitlines()), len(codes)) - 1]
time.sleep(300 if code == "wait" else 0.5)
sys.exit(int(code))
"""


@pytest.fixture
def supervise(tmp_path):
    started = []

    def start(codes: str, *options: str) -> subprocess.Popen:
        tool = [sys.executable, str(REPOSITORY / "launch/supervise.py"), "--backoff", "0.2", *options]
        command = [sys.executable, "-c", COMMAND, str(tmp_path / "lives"), codes]
        started.append(subprocess.Popen([*tool, "--", *command], stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def lives(folder: Path) -> list[tuple[int, float]]:
    """Return the child and the start time of each run."""
    file = folder / "lives"
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(int(pid), float(began)) for pid, began in rows]


def wait_for_a_life(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not lives(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return lives(folder)[0][0]


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_failed_command_is_started_again_later_each_time_and_leaves_nothing_behind(supervise, tmp_path):
    process = supervise("7,1,0")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "exit code 7; restart 1 of 3" in said and "restart 2 of 3" in said
    children, began = zip(*lives(tmp_path), strict=True)
    assert len(children) == 3 and all(gone(child) for child in children)
    assert began[1] - began[0] >= 0.5 + 0.2 and began[2] - began[1] >= 0.5 + 0.4


def test_restarts_are_bounded_within_the_window(supervise, tmp_path):
    process = supervise("7", "--max_restarts", "2")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 7 and len(lives(tmp_path)) == 3 and "after 2 restarts within 3600 s" in said


def test_old_restarts_do_not_count(supervise, tmp_path):
    process = supervise("7,7,7,0", "--max_restarts", "1", "--window", "0.3", "--backoff", "0.4")
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(lives(tmp_path)) == 4


def test_a_refused_configuration_is_not_tried_again(supervise, tmp_path):
    process = supervise("2")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and len(lives(tmp_path)) == 1 and "configuration" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_command_and_supervisor(supervise, tmp_path, number):
    process = supervise("wait")
    child = wait_for_a_life(tmp_path)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number and gone(child) and len(lives(tmp_path)) == 1


def test_a_command_that_does_not_listen_is_killed(tmp_path):
    deaf = f"trap '' TERM; echo 1 0 > {tmp_path}/lives; while true; do sleep 0.1; done"
    tool = [sys.executable, str(REPOSITORY / "launch/supervise.py"), "--grace", "1", "--", "bash", "-c", deaf]
    process = subprocess.Popen(tool, stderr=subprocess.PIPE)
    wait_for_a_life(tmp_path)
    command = psutil.Process(process.pid).children()[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM and gone(command.pid)


def test_the_command_ends_with_a_killed_supervisor(supervise, tmp_path):
    process = supervise("wait")
    wait_for_a_life(tmp_path)
    command = psutil.Process(process.pid).children()[0].pid
    process.kill()
    process.wait()
    assert gone(command)
    os.kill(lives(tmp_path)[0][0], signal.SIGKILL)  # its children must watch their parent themselves, as ranks do


def test_a_command_that_cannot_be_started_is_reported():
    tool = [sys.executable, str(REPOSITORY / "launch/supervise.py"), "--", "/no/such/command"]
    result = subprocess.run(tool, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "/no/such/command cannot be started" in result.stderr
