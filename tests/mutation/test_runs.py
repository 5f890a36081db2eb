"""mutation/runs.py and workplace.py on a toy repository: what its tests notice, and that only copies are changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from respec_trainer.processes import parent_death_signal

ROOT = Path(__file__).parents[2]

TOY = """
def halved(numbers):
    return [number // 2 for number in numbers if number > 1]


def unseen(number):
    return number - 1


def same(number):
    return abs(abs(number))
"""
CHECK = """
from respec_trainer.toy import halved


def test_halved():
    assert halved([4, 1, 2]) == [2, 1]
"""
# In processes of their own: they fork, and the processes of pytest-xdist have threads.
PLANTS = """
import os, sys
from pathlib import Path
import pytest  # once for all processes
from tests.mutation import runs
from tests.mutation.table import Module

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
toy = Module("toy", "respec_trainer/toy.py", (), ("checks/test_toy.py",))
for result in runs.run(Path(sys.argv[1]), [toy], most=100, seed=0, workers=int(sys.argv[3]), place=Path(sys.argv[2])):
    print(f"{result.noticed} {result.slow} {result.mutant.within}: {result.mutant.was} -> {result.mutant.now}")
"""
WAITS = """
import sys, time
from pathlib import Path
import psutil
from tests.mutation.workplace import Workplace, wait

workplace = Workplace(Path(sys.argv[1]), Path(sys.argv[2]) / "0")
pid = workplace.start(["checks/test_toy.py"])
while not (children := psutil.Process(pid).children()):
    time.sleep(0.01)
outcome = wait(pid, 0.1)
gone, alive = psutil.wait_procs(children, timeout=60)
print(outcome.status, outcome.noticed, psutil.pid_exists(pid), len(gone), len(alive))
"""
FOREVER = """
import subprocess


def test_forever():
    subprocess.run(["sleep", "600"])
"""


def run(tmp_path: Path, script: str, check: str, *words: str) -> subprocess.CompletedProcess:
    """Run a script on a repository of the toy module and one file of tests, which the script must not change."""
    root = tmp_path / "repository"
    for name, text in (("respec_trainer/toy.py", TOY), ("checks/test_toy.py", check)):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    (tmp_path / "place").mkdir()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    command = [sys.executable, "-c", script, root, tmp_path / "place", *words]
    ends_with_us = parent_death_signal(9)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=ends_with_us)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    return ended


def test_mutants_are_planted_one_at_a_time_and_noticed_where_there_is_a_test(tmp_path):
    ended = run(tmp_path, PLANTS, CHECK, "2")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert {line.removeprefix("False False ") for line in lines if line.startswith("False ")} == {
        "unseen: return number - 1 -> return None",
        "unseen: number - 1 -> ((number) + (1))",
        "unseen: 1 -> 2",
        "unseen: 1 -> (0)",
        "same: return abs(abs(number)) -> return None",
        "same: abs(abs(number)) -> (abs(number))",
        "same: abs(number) -> (number)",
    }
    assert {line.removeprefix("True False ") for line in lines if line.startswith("True ")} == {
        "halved: return [number // 2 for number in numbers if number > 1] -> return None",
        "halved: number // 2 -> ((number) * (2))",
        "halved: 2 -> 3",
        "halved: 2 -> (1)",
        "halved: number > 1 -> ((number) >= (1))",
        "halved: number > 1 -> True",
        "halved: 1 -> 2",
        "halved: 1 -> (0)",
    }
    told = [line for line in lines if line.startswith("survives: ")]
    assert len(told) == 7 and "survives: respec_trainer/toy.py:7 unseen: 1  ->  2" in told
    for copy in (tmp_path / "place/0", tmp_path / "place/1"):
        assert (copy / "respec_trainer/toy.py").read_text() == TOY, "restored"


def test_tests_that_fail_without_a_mutant_are_reported(tmp_path):
    ended = run(tmp_path, PLANTS, CHECK.replace("[2, 1]", "[]"), "1")
    assert ended.returncode == 1
    assert "toy: tests fail or find nothing without a mutant" in ended.stderr and "test_halved" in ended.stderr


def test_tests_that_do_not_end_are_ended_with_their_children_and_count_as_noticing(tmp_path):
    ended = run(tmp_path, WAITS, FOREVER)
    assert ended.stdout.split() == ["None", "True", "False", "1", "0"], ended.stderr
