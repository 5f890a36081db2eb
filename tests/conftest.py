"""All tests: files run in the order of their durations, and slow tests are marked `long`.

`make test` gives whole files to its workers. With the longest files first, the short ones at the end let all workers
finish together.
"""

from __future__ import annotations

import pytest

from tests import durations


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write the seconds of each file to tests/durations.json, which orders the files"
    parser.addoption("--write-durations", action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    # With workers, the main process gets the reports of all of them.
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Stopwatch())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = durations.longest_first([item.nodeid for item in items], durations.load())
    items[:] = [items[position] for position in order]
