"""benchmarks/scale/traffic.py: volumes counted message by message, on small numbers."""

from __future__ import annotations

import pytest

from benchmarks.scale.hardware import H100
from benchmarks.scale.traffic import Layout, Volumes, push, ring, tensor_parallel, update
from tests.support.models import tiny_config

ACTOR, DRAFTER = 1000, 100


def test_a_ring_brings_each_rank_what_the_others_hold():
    for ranks in (1, 2, 5):
        shares = [700 / ranks] * ranks
        assert ring(700, ranks) == pytest.approx(sum(shares[1:]))


def test_a_colocated_push_gathers_once_and_each_rank_reads_its_part():
    said = push(ACTOR, DRAFTER, Layout(tp=4, dp=8, zero=1, engine_tp=4), H100)
    assert said.collected.within == 2 * ACTOR * 3 / 4 and said.collected.across == 0
    assert said.delivered.within == 2 * (ACTOR + DRAFTER) / 4
    alone = push(ACTOR, DRAFTER, Layout(tp=1, dp=8, zero=1, engine_tp=1), H100)
    assert alone.collected.within == alone.delivered.within == 0
    assert alone.collected.local == 3 * 2 * (ACTOR + DRAFTER)


def test_zero_3_gathers_each_ranks_shard_first():
    one_host = push(ACTOR, 0, Layout(tp=2, dp=4, zero=3, engine_tp=2), H100).collected
    assert one_host.within == 2 * ACTOR / 2 + (2 * ACTOR / 2) * 3 / 4 and one_host.across == 0
    two_hosts = push(ACTOR, 0, Layout(tp=2, dp=8, zero=3, engine_tp=2), H100).collected
    assert two_hosts.across == (2 * ACTOR / 2) * 7 / 8


def test_engines_elsewhere_get_all_of_it_over_the_network():
    said = push(ACTOR, DRAFTER, Layout(tp=2, dp=8, zero=1, engine_tp=2, colocated=False), H100)
    assert said.delivered.across == 2 * (ACTOR + DRAFTER)
    assert said.seconds(H100) == max(said.collected.seconds(H100), said.delivered.seconds(H100))


@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        (1, 2 + 1),  # all-reduce of gradients: reduce-scatter and all-gather; all-gather of weights
        (2, 5 + 1),  # reduce-scatter after each of five micro-batches
        (3, 5 * 3 + 4),  # weights forward and backward, gradients; four passes that only score
    ],
)
def test_an_update_sends_the_traffic_of_its_zero_stage(stage, rounds):
    volumes = update(ACTOR, Layout(tp=2, dp=8, zero=stage, engine_tp=2), H100, passes=5, scored=4)
    assert volumes.across == pytest.approx(rounds * (2 * ACTOR / 2) * 7 / 8) and volumes.within == 0


def test_tensor_parallelism_all_reduces_twice_a_layer_and_direction():
    config = tiny_config("qwen2", layers=3)
    said = tensor_parallel(config, Layout(tp=4, dp=1, zero=1, engine_tp=4), passes_tokens=10, scored_tokens=0)
    all_reduce = 2 * (2 * 64) * 3 / 4  # of 64 bf16 numbers over four ranks
    forward = backward = again = 2 * 3 * all_reduce
    assert said.within == pytest.approx(10 * (forward + backward + again))


def test_times_add_up_over_links():
    said = Volumes(within=2 * H100.within, across=3 * H100.across, local=H100.bandwidth)
    assert said.seconds(H100) == pytest.approx(6) and (said + said).seconds(H100) == said.times(2).seconds(H100)
