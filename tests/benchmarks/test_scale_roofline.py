"""benchmarks/scale/roofline.py: both limits, of memory and of arithmetic, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scale.hardware import H100
from benchmarks.scale.roofline import roofline
from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.plan.sizes import DrafterSizes
from respec_trainer.speculation.shape import chain
from tests.support.models import tiny_config

CONFIG = tiny_config("qwen3", layers=4)
DRAFTER = DrafterSizes(DrafterShape.for_target(CONFIG, 64))
# Without launches and hops only bytes and operations are left; tests set one of the two rates to infinity.
BARE = replace(H100, launch=0.0, hop=0.0)


def parameters() -> int:
    from tests.support.models import tiny_model

    return sum(weight.numel() for weight in tiny_model(CONFIG).parameters())


def test_a_step_of_one_sequence_reads_weights_and_cache():
    costs = roofline(CONFIG, DRAFTER, 1, replace(BARE, flops=1e30))
    cached = 100 * 2 * 4 * 2 * 32 * 2  # tokens, keys and values, layers, heads, their size, bytes
    assert costs.step_seconds(1, 100) == pytest.approx((2 * parameters() + cached) / BARE.bandwidth, rel=1e-6)


def test_a_large_batch_computes():
    costs = roofline(CONFIG, DRAFTER, 1, replace(BARE, bandwidth=1e30))
    attention = 4 * 4 * (4 * 32) * 100  # operations a layer, layers, heads x size, keys
    assert costs.step_seconds(50, 100) == pytest.approx(50 * (2 * parameters() + attention) / BARE.flops, rel=1e-6)


def test_a_chain_drafts_one_less_than_it_verifies_and_speculation_pays_only_while_memory_bounds():
    costs = roofline(CONFIG, DRAFTER, 1, BARE)
    passes = costs.piece_seconds("draft", chain(3), 1, 10) / costs.piece_seconds("extend", chain(3), 1, 10)
    assert passes == pytest.approx(2, rel=0.01), "the third draft follows from the extend"
    # The context is 0, because reading caches is bound by memory at every batch size.
    few, many = (costs.cycle_seconds(chain(3), b, 0) / costs.step_seconds(b, 0) for b in (1, 100_000))
    assert few < 3 and many > 4


def test_more_gpus_share_the_reading_and_add_hops():
    one, two = (roofline(CONFIG, DRAFTER, tp, replace(H100, launch=0.0)) for tp in (1, 2))
    hops = 2 * 4 * H100.hop
    assert two.step_seconds(1, 10) - hops == pytest.approx(one.step_seconds(1, 10) / 2, rel=0.05)
