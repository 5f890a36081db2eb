"""plan/: sizes of the shipped models against transformers', and the parts of each phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config_file import load_config
from respec_trainer.plan import GB, Cluster, plan_layout, plan_memory
from respec_trainer.plan.memory import MOVED
from respec_trainer.plan.sizes import ActorSizes, cache_bytes
from respec_trainer.plan.zero import ZeroSizes
from respec_trainer.preflight.checks import read_model_config

TOP_P = "rollout.sampling.top_p=0.9"
CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(size: str):
    return read_model_config(CONFIGS / f"models/qwen2.5-{size}.json")


@pytest.mark.parametrize("size", ["3b", "7b", "14b"])
def test_numbers_of_a_model_are_transformers(size):
    define_torchvision_operators()
    from transformers import AutoModelForCausalLM

    hf = config_of(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    whole = sum(parameter.numel() for parameter in model.parameters())
    replicated = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    assert ActorSizes(hf, 1, 2).parameters == whole
    assert 4 * (ActorSizes(hf, 4, 2).parameters - replicated) == whole - replicated


def test_cache_of_a_token():
    assert cache_bytes(config_of("7b"), 1, 2) == 2 * 28 * 4 * 128 * 2
    assert cache_bytes(config_of("7b"), 2, 2) == 28 * 4 * 128 * 2
    assert cache_bytes(config_of("3b"), 4, 2) == 2 * 36 * 128 * 2, "a head is never cut"


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer", "gradients"), [(1, 2, 3, 4), (2, 2, 3, 1), (3, 0.5, 3, 1 + 2 * 0.05)]
)
def test_zero_shares_out(stage, weights, optimizer, gradients):
    zero = ZeroSizes(10**9, 2, dp=4, stage=stage, largest=10**8)  # a bucket is 5 % of the model's numbers
    assert [part / 1e9 for part in (zero.weights, zero.optimizer, zero.gradients)] == [weights, optimizer, gradients]


def plan(*overrides: str, cluster: Cluster = Cluster(1, 8, "cuda")):  # noqa: B008 - it is frozen
    config = load_config(CONFIGS / "qwen2.5-7b-1node.yaml", overrides)
    return plan_memory(config, config_of("7b"), plan_layout(config, cluster), 80 * GB)


def named(memory, phase: str) -> set[str]:
    return {part.name for part in memory.parts if phase in part.phases}


def test_engines_and_trainer_take_turns_on_shared_gpus():
    (memory,) = plan()
    assert {"actor: weights", "engine: weights"} <= named(memory, "resync")
    assert "actor: weights" not in named(memory, "generate") and "engine: weights" not in named(memory, "train")
    assert "engine: key/value cache" not in named(memory, "resync")
    moved = sum(part.bytes for part in memory.parts if part.name in MOVED)
    assert memory.host == moved + 16384 * 2**20


def test_nobody_takes_turns_on_gpus_of_their_own():
    trains, generates = plan("rollout.placement=disaggregated", "rollout.engine_ranks=4")
    assert "actor: optimizer" in named(trains, "generate") and trains.pool_tokens is None
    assert not any(part.name.startswith("engine") for part in trains.parts)
    assert generates.total("train") == generates.total("generate") > 50 * GB
    assert generates.pool_tokens > plan()[0].pool_tokens


def test_the_cache_is_a_share_of_what_is_free():
    (half,), (limited,) = plan("rollout.engine.mem_fraction=0.5"), plan("rollout.engine.max_total_tokens=20000")
    assert half.pool_tokens < plan()[0].pool_tokens and limited.pool_tokens == 20000


def test_searching_for_what_top_p_keeps_takes_memory():
    """Two float32 tables and two masks more, of 1024 tokens by this rank's vocabulary."""
    hf = config_of("7b")
    more = 1024 * hf.vocab_size // 4 * (2 * 4 + 2)
    assert ActorSizes(hf, 4, 2).logits(1024, True) - ActorSizes(hf, 4, 2).logits(1024) == pytest.approx(more, rel=0.01)
    whole, truncated, allowed = (
        {part.name: part.bytes for part in plan(*keys)[0].parts}["actor: logits"]
        for keys in ((), (TOP_P,), (TOP_P, "rollout.sampling.allow_untruncated=true"))
    )
    assert truncated > whole == allowed


def test_without_a_learner_or_a_drafter_they_take_nothing():
    (frozen,), (plain,) = plan("drafter.weighting=none"), plan("drafter.weighting=none", "speculation.algorithm=none")
    assert not any(part.name.startswith("learner") for part in frozen.parts) and frozen.host < plan()[0].host
    assert "engine: drafter" in named(frozen, "resync") and "engine: drafter" not in named(plain, "resync")
