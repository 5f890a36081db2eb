"""Seconds that each file of tests takes, which `make test` needs to order them: see tests/conftest.py.

The table, durations.json, is made anew from a run of the tests:

    make test ARGS=--write-durations
    make test-long ARGS=--write-durations        # adds the files that only this one runs
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

TABLE = Path(__file__).with_name("durations.json")
UNKNOWN = 5.0  # seconds: a new file runs before those that are known to be short


def file_of(nodeid: str) -> str:
    """The file of a test, from tests/ on."""
    return nodeid.partition("::")[0].removeprefix("tests/")


def longest_first(nodeids: Iterable[str], seconds: Mapping[str, float]) -> list[int]:
    """Positions of the tests, so that files come by their seconds, longest first, and tests of a file stay in order."""
    files = [file_of(nodeid) for nodeid in nodeids]
    return sorted(range(len(files)), key=lambda i: (-seconds.get(files[i], UNKNOWN), files[i]))


def load() -> dict[str, float]:
    return json.loads(TABLE.read_text())


def save(measured: Mapping[str, float]) -> None:
    """Put measured files into the table; drop those that are not there any more."""
    known = load() | {name: round(seconds, 1) for name, seconds in measured.items()}
    there = {name: known[name] for name in sorted(known) if (TABLE.parent / name).is_file()}
    TABLE.write_text(json.dumps(there, indent=1) + "\n")


class Stopwatch:
    """A pytest plugin that adds up what the phases of the tests take, and writes the table at the end."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        save(self.seconds)
