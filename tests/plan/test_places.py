"""plan/places.py: the place of every rank, and groups that would reach over hosts."""

from __future__ import annotations

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.plan.places import Cluster, plan_layout
from tests.support.configs import smallest_config

TWO_HOSTS = Cluster(2, 4, "cuda")


@pytest.fixture
def layout(tmp_path):
    def layout(*overrides: str, cluster: Cluster = TWO_HOSTS):
        config = smallest_config(tmp_path, "run.device=auto", "data.prompts_per_step=32", *overrides)
        return plan_layout(config, cluster)

    return layout


def test_colocated_ranks_train_and_generate(layout):
    found = layout("actor.parallel.tp=2", "rollout.engine.span=4", "rollout.engine.tp=4")
    sixth = found.ranks[6]
    assert (sixth.host, sixth.device, sixth.tp_rank, sixth.dp_rank, sixth.engine) == (1, "cuda:2", 0, 3, 1)
    assert [place.rank for place in found.ranks if place.starts is not None] == [0, 4]
    assert found.dp == 4 and found.colocated and found.transport == "cuda_ipc"


def test_disaggregated_ranks_do_one_or_the_other(layout):
    found = layout("rollout.placement=disaggregated", "rollout.engine_ranks=4", "rollout.engine.span=2")
    assert [place.dp_rank for place in found.ranks] == [0, 1, 2, 3, None, None, None, None]
    assert [place.engine for place in found.ranks] == [None, None, None, None, 0, 0, 1, 1]
    assert [place.starts for place in found.ranks] == [None, None, None, None, 0, None, 1, None]
    assert [place.rank for place in found.ranks if place.feeds is not None] == found.placement.owners
    assert found.dp == 4 and not found.colocated and found.transport == "nccl"


def test_without_gpus_ranks_of_all_hosts_may_share_an_engine(layout):
    found = layout("run.device=cpu", "rollout.engine.span=8", "actor.parallel.tp=8", cluster=Cluster(2, 4, "cpu"))
    assert {place.device for place in found.ranks} == {"cpu"} and found.transport == "gloo"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actor.parallel.tp=8"], "tp=8 does not divide the 4 GPUs of a host.*divisor of 4"),
        (["rollout.engine.span=8"], "span=8: the engine of ranks 0 to 7 would reach over hosts of 4 GPUs"),
        (["rollout.engine.span=1", "rollout.engine.tp=2"], "tp=2 is more GPUs than the 1.*span=2"),
        (["actor.parallel.tp=3"], "tp=3 does not divide the 8 ranks"),
        (["rollout.engine.span=3"], "span=3 does not divide"),
        (["resync.transport=nccl"], "cannot share a GPU; use cuda_ipc"),
    ],
)
def test_what_cannot_be_placed_is_named(layout, overrides, words):
    with pytest.raises(ConfigError, match=words):
        layout(*overrides)


def test_an_engine_at_the_edge_of_a_host(layout):
    shape = ["rollout.placement=disaggregated", "rollout.engine_ranks=6", "rollout.engine.span=3"]
    with pytest.raises(ConfigError, match="ranks 2 to 4 would reach over hosts"):
        layout(*shape)


@pytest.mark.parametrize("variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_cluster_of_a_launcher(monkeypatch, variable):
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Cluster.of_launcher("cpu") is None
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv(variable, "3")
    assert Cluster.of_launcher("cuda") == Cluster(2, 3, "cuda")
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ConfigError, match="4 ranks on this host do not divide all 6"):
        Cluster.of_launcher("cuda")
