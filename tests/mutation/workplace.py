"""Workplaces: copies of the repository in which mutants are planted, and processes that run tests there.

The processes are forked from this one, which has imported the heavy libraries: a mutant costs what its tests cost.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from respec_trainer.processes import collect_garbage_again, kill_tree, parent_death_signal
from tests.mutation.mutants import Mutant

OUTPUT = ".pytest.txt"
LEFT_OUT = (".git", ".venv", ".cache", "runs", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
# In this order: DeepSpeed before others settle its accelerator, by DS_ACCELERATOR.
HEAVY = """
torch numpy scipy.stats deepspeed pydantic yaml rich.progress safetensors.torch psutil xxhash pyarrow.parquet
hypothesis.strategies transformers.models.auto transformers.modeling_utils pytest
"""
# Modules of the package that stay imported: shims that can be applied once only, and what they import.
SHIMS = "respec_trainer.compat"
PASSED, NO_TESTS = 0, 5  # of pytest's exit statuses; all others mean that a test or an import failed


@dataclass(frozen=True)
class Outcome:
    """The end of the tests: pytest's exit status, or None if they took longer than they may; and their seconds."""

    status: int | None
    seconds: float

    @property
    def noticed(self) -> bool:
        """Return whether the tests noticed a fault."""
        return self.status not in (PASSED, NO_TESTS)


def import_heavy() -> None:
    """Import what most tests import, once for all mutants. Nothing of the package but its shims stays imported."""
    importlib.import_module(SHIMS).prepare("cpu")
    for name in HEAVY.split():
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("respec_trainer", "tests")]:
        if not (name.startswith(SHIMS) or name in ("respec_trainer", "respec_trainer.errors") or "mutation" in name):
            del sys.modules[name]
    collect_garbage_again()  # not among these objects: pytest does it often, and it takes longer than most tests


class Workplace:
    """A copy of the repository at `root`, in the folder `place`, with at most one mutant at a time."""

    def __init__(self, root: Path, place: Path, bytecode: bool = False):
        """`bytecode`: copy it too; valid in the copy, whose files have the same times."""
        self.place = place
        left_out = [pattern for pattern in LEFT_OUT if not (bytecode and pattern == "__pycache__")]
        shutil.copytree(root, place, ignore=shutil.ignore_patterns(*left_out))

    def output(self) -> str:
        """Return the end of what the last tests printed."""
        return (self.place / OUTPUT).read_text(errors="replace")[-3000:]

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """Change the module within the block. Its time changes too: Python uses old bytecode for an equal time."""
        path = self.place / mutant.module
        original, times = path.read_bytes(), path.stat()
        path.write_bytes(mutant.source(original))
        os.utime(path, (times.st_atime + 10, times.st_mtime + 10))
        try:
            yield
        finally:
            path.write_bytes(original)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def start(self, tests: Sequence[str], keep_bytecode: bool = False) -> int:
        """Start a process that runs `tests` until one fails; return its number."""
        pid = os.fork()
        if pid == 0:
            self._run(tests, keep_bytecode)
        return pid

    def _run(self, tests: Sequence[str], keep_bytecode: bool) -> None:
        """Run pytest and end this process with its status, whatever happens."""
        status = 3
        try:
            parent_death_signal(signal.SIGKILL)()
            output = os.open(self.place / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.place)
            sys.path.insert(0, str(self.place))
            sys.modules["respec_trainer"].__path__[:] = [str(self.place / "respec_trainer")]
            os.environ["PYTHONPATH"] = str(self.place)
            if not keep_bytecode:
                sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
            import pytest

            plain = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-p",
                "no:unraisableexception",
                "--tb=short",
                "-m",
                "not long",
            ]
            status = int(pytest.main([*tests, *plain], plugins=[WithoutRanks()]))
        finally:
            os._exit(status)


class WithoutRanks:
    """Leaves out tests on several ranks: their processes start for longer than a mutant should take."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if "run_ranks" not in item.function.__code__.co_names]


def wait(pid: int, seconds: float) -> Outcome:
    """Wait for a process of `start`; end it, and those that it started, after `seconds`."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - began)
        time.sleep(0.01)
    kill_tree(psutil.Process(pid))
    os.waitpid(pid, 0)
    return Outcome(None, seconds)
