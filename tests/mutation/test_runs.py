"""mutation/runs.py on a toy repository: what its tests notice, and that nothing but the copy is changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from respec_trainer.processes import parent_death_signal

ROOT = Path(__file__).parents[2]

TOY = """
def halved(numbers):
    halves, left = [], list(numbers)
    while left:
        halves.append(left.pop() // 2)
    return halves


def unseen(number):
    return number - 1


def same(number):
    return abs(abs(number))
"""
CHECK = """
from respec_trainer.toy import halved


def test_halved():
    assert halved([4, 7, 1]) == [0, 3, 2]
"""
# In a process of its own: the runner forks, and the processes of pytest-xdist have threads.
SCRIPT = """
import sys
from pathlib import Path
from tests.mutation import runs
import respec_trainer
from tests.mutation.table import Module

runs.PATIENCE = 2.0
toy = Module("toy", "respec_trainer/toy.py", (), ("checks/test_toy.py",))
for result in runs.run(Path(sys.argv[1]), [toy], most=100, seed=0, workers=int(sys.argv[3]), place=Path(sys.argv[2])):
    print(f"{result.noticed} {result.slow} {result.mutant.within}: {result.mutant.was} -> {result.mutant.now}")
"""


def run(tmp_path: Path, check: str = CHECK, workers: int = 2) -> subprocess.CompletedProcess:
    root = tmp_path / "repository"
    for name, text in (("respec_trainer/toy.py", TOY), ("checks/test_toy.py", check)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "place").mkdir()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    words = [sys.executable, "-c", SCRIPT, root, tmp_path / "place", str(workers)]
    ended = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=parent_death_signal(9)
    )
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before, "only copies are changed"
    return ended


def test_mutants_are_planted_one_at_a_time_and_noticed_where_there_is_a_test(tmp_path):
    ended = run(tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("True", "False"))]
    survivors = {line.split(" ", 2)[2] for line in lines if line.startswith("False")}
    assert survivors == {
        "unseen: return number - 1 -> return None",
        "unseen: number - 1 -> ((number) + (1))",
        "unseen: 1 -> 2",
        "unseen: 1 -> (0)",
        "same: return abs(abs(number)) -> return None",
        "same: abs(abs(number)) -> (abs(number))",
        "same: abs(number) -> (number)",
    }
    assert "True True halved: halves.append(left.pop() // 2) -> pass" in lines, "a loop without end is noticed too"
    assert "True False halved: left.pop() // 2 -> ((left.pop()) * (2))" in lines
    told = {line.partition(" unseen: ")[2] for line in ended.stdout.splitlines() if line.startswith("survives: ")}
    assert "1  ->  2" in told
    for copy in (tmp_path / "place/0", tmp_path / "place/1"):
        assert (copy / "respec_trainer/toy.py").read_text() == TOY, "restored"


def test_tests_that_fail_without_a_mutant_are_reported(tmp_path):
    ended = run(tmp_path, CHECK.replace("[0, 3, 2]", "[]"), workers=1)
    assert ended.returncode == 1
    assert "toy: tests fail or find nothing without a mutant" in ended.stderr and "test_halved" in ended.stderr
