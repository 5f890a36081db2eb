"""placement.py: the ranks that train, hold engines and own them; and refused placements."""

from __future__ import annotations

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.placement import Placement, check_world
from tests.support.configs import smallest_config


def place(folder, world, *overrides):
    return Placement.of(smallest_config(folder, *overrides), world)


def apart(ranks, span=1):
    return ["rollout.placement=disaggregated", f"rollout.engine_ranks={ranks}", f"rollout.engine.span={span}"]


def test_colocated_engines_belong_to_the_first_rank_of_their_span(tmp_path):
    here = place(tmp_path, 4, "rollout.engine.span=2")
    assert here.engine_launchers == here.owners == [0, 2]
    assert all(here.trains(rank) for rank in range(4))


@pytest.mark.parametrize(
    ("world", "ranks", "span", "hosts", "owners"),
    [
        (16, 8, 1, [8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 8, 4, [8, 12], [0, 4]),  # the owners are spread over the hosts
        (3, 1, 1, [2], [0]),
        (7, 2, 1, [5, 6], [0, 2]),
    ],
)
def test_engines_on_ranks_of_their_own(tmp_path, world, ranks, span, hosts, owners):
    here = place(tmp_path, world, *apart(ranks, span))
    assert (here.engine_launchers, here.owners, here.engines) == (hosts, owners, len(hosts))
    assert [here.trains(rank) for rank in range(world)] == [True] * (world - ranks) + [False] * ranks


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (2, apart(2), "leave none to train"),
        (4, apart(3, 2), "engine.span=2 does not divide rollout.engine_ranks=3"),
        (3, ["rollout.engine.span=2"], "engine.span=2 does not divide the 3 ranks started"),
        (5, apart(3), "3 engines .* are more than the 2 ranks that train"),
    ],
)
def test_what_cannot_be_dealt_out(tmp_path, world, overrides, words):
    with pytest.raises(ConfigError, match=words):
        place(tmp_path, world, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.placement=disaggregated"], "need ranks"),
        (["rollout.engine_ranks=1"], "colocated ones are on all"),
        ([*apart(1), "resync.transport=cuda_ipc"], "they share none"),
    ],
)
def test_keys_that_go_together(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        smallest_config(tmp_path, *overrides)


def test_the_actor_is_laid_out_over_the_ranks_that_train(tmp_path):
    config = smallest_config(tmp_path, *apart(1), "actor.parallel.tp=2")
    check_world(config, 3)
    with pytest.raises(ConfigError, match=r"tp=2 does not divide the 3 ranks that train; .*--num_gpus 3"):
        check_world(config, 4)


@pytest.mark.parametrize(
    ("world", "minibatches", "fits"),
    [(1, 8, True), (2, 4, True), (4, 2, True), (8, 1, True), (2, 8, False), (4, 4, False)],
)
def test_every_rank_gets_samples_of_every_minibatch(tmp_path, world, minibatches, fits):
    config = smallest_config(tmp_path, f"objective.minibatches={minibatches}")  # 8 samples a step
    if fits:
        check_world(config, world)
        return
    with pytest.raises(ConfigError, match=rf"minibatches={minibatches}; make it a multiple of {world * minibatches}$"):
        check_world(config, world)


def test_ranks_of_one_model_share_their_samples(tmp_path):
    config = smallest_config(tmp_path, "objective.minibatches=4", "actor.parallel.tp=2")
    check_world(config, 4)
    with pytest.raises(ConfigError, match="8 samples do not split over 4 data-parallel ranks"):
        check_world(config, 8)
