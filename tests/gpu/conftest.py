"""Setup of all GPU tests: when they are skipped, what they record, and the models they run on.

make test-gpu                                   # one GPU or several; results as JSON and in docs/gpu.md
RESPEC_GPU_TESTS=cpu pytest tests/gpu           # a rehearsal of the tests themselves, without a GPU
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu import place
from tests.gpu.models import LARGE, SMALL, Pair, save_pair
from tests.gpu.results import Results
from tests.support.processes import ranks

RESULTS = os.environ.get("RESPEC_GPU_RESULTS")  # a file; default: nothing is written

ranks.FORKED = not place.ON_GPU or place.missing(1) is not None
_results = Results(Path(RESULTS)) if RESULTS else None


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpus(count): GPUs that the test needs; default 1")
    config.addinivalue_line("markers", "point(number): settles this open point of docs/gpu.md")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Skip a test before its fixtures are made. All tests skip at this line, so pytest reports them in one line."""
    marker = item.get_closest_marker("gpus")
    reason = place.missing(marker.args[0] if marker else 1)
    if reason:
        pytest.skip(reason)


def pytest_runtest_logreport(report) -> None:
    if _results and report.nodeid.startswith("tests/gpu/"):
        _results.add(report)


@pytest.fixture
def record(request):
    """Return record(name=value, ...), which adds numbers and texts to the results, whether the test passes or not."""
    marker = request.node.get_closest_marker("point")
    if marker:
        request.node.user_properties.append(("point", marker.args[0]))

    def keep(**values) -> None:
        request.node.user_properties.extend(values.items())

    return keep


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Pair:
    """A target with a distribution that can be tested, and a drafter that is often right, in float32."""
    return save_pair(tmp_path_factory.mktemp("small"), SMALL, "fp32")


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Pair:
    """A target of hundreds of MB, so that sending it takes time, and a drafter that is often right, in bf16."""
    return save_pair(tmp_path_factory.mktemp("large"), LARGE if place.ON_GPU else SMALL, "bf16")
