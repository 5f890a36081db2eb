"""The seconds of each test file, by which `make test` orders them: see tests/conftest.py.

The table, durations.json, is written by a run of the tests:

    make test ARGS=--write-durations
    make test-long ARGS=--write-durations        # adds the files that only this command runs
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

TABLE = Path(__file__).with_name("durations.json")
UNKNOWN = 5.0  # seconds; a new file runs before files that are known to be short


def file_of(nodeid: str) -> str:
    """Return the file of a test, relative to tests/."""
    return nodeid.partition("::")[0].removeprefix("tests/")


def longest_first(nodeids: Iterable[str], seconds: Mapping[str, float]) -> list[int]:
    """Return the order of the tests: files by their seconds, longest first; tests of a file in their order."""
    files = [file_of(nodeid) for nodeid in nodeids]
    return sorted(range(len(files)), key=lambda i: (-seconds.get(files[i], UNKNOWN), files[i]))


def load() -> dict[str, float]:
    return json.loads(TABLE.read_text())


def save(measured: Mapping[str, float]) -> None:
    """Put measured files into the table; remove files that do not exist any more."""
    known = load() | {name: round(seconds, 1) for name, seconds in measured.items()}
    existing = {name: known[name] for name in sorted(known) if (TABLE.parent / name).is_file()}
    TABLE.write_text(json.dumps(existing, indent=1) + "\n")


class Stopwatch:
    """A pytest plugin that adds up the seconds of each test's phases, and writes the table at the end."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        save(self.seconds)
