"""Actor and engine on one GPU: weights by CUDA IPC, memory that is really given back, a drafter that comes back."""

from __future__ import annotations

import pytest

from tests.gpu import colocated
from tests.gpu.place import ON_GPU
from tests.support.processes.ranks import run_ranks


@pytest.fixture(scope="module")
def found(large, tmp_path_factory) -> dict:
    (answer,) = run_ranks(1, colocated.run, large, tmp_path_factory.mktemp("colocated"), timeout=240)
    return answer


@pytest.fixture
def stage(found, record):
    """What a stage found, recorded; the test fails where the stage did."""

    def take(name: str) -> dict:
        record(**found[name])
        assert "error" not in found[name], found[name]["error"]
        return found[name]

    return take


@pytest.mark.point(6)
def test_point_6_weights_arrive_by_cuda_ipc_and_are_proved(stage):
    carried = stage("carry")
    assert carried["transport"] == "IPCTransport"
    assert carried["version"] == f"actor-{colocated.PUSHES}"


def test_the_engine_speaks_with_the_actors_voice(stage):
    assert stage("speak")["canary_error"] <= 0.25


def test_sleep_returns_the_memory_of_engine_and_actor(stage):
    seen = stage("sleep_and_wake")
    if not ON_GPU:
        pytest.skip("a rehearsal on a CPU has no second memory to give back; the stage itself ran")
    taken, least = seen["taken"], seen["at_least"]
    assert taken["both"] - taken["engine_out"] >= 0.9 * least["engine"]
    assert taken["engine_out"] - taken["both_out"] >= 0.9 * least["actor"]
    # Page tables and workspaces may differ; what was given back is there again.
    assert abs(taken["both_again"] - taken["both"]) <= 0.05 * taken["both"]


@pytest.mark.point(3)
def test_point_3_the_drafter_survives_sleep_and_wake(stage):
    seen = stage("survive")
    assert seen["same_digests"]
    assert seen["accept_length_before"] > 1.3, "a drafter that is never right would not be missed"
    # bf16: a batch that is put together otherwise may decide a near tie otherwise.
    assert seen["accept_length_after"] == pytest.approx(seen["accept_length_before"], rel=0.05)


@pytest.mark.point(4)
def test_point_4_selector_all_writes_into_the_drafter_and_a_whole_push_repairs_it(stage):
    seen = stage("select_all")
    assert seen["drafter_tensors_overwritten"] == ["lm_head.weight"]
    assert seen["accept_length_repaired"] == pytest.approx(seen["accept_length_before"], rel=0.05)
