"""plan/: sizes of the shipped models against transformers', and the parts of each phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config_file import load_config
from respec_trainer.plan import GB, Cluster, plan_layout, plan_memory
from respec_trainer.plan.learner import learner_problems
from respec_trainer.plan.memory import MOVED, drafter_sizes
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


# Qwen2.5-7B in bf16: hidden size, MLP, query heads, key/value heads, head size, layers, vocabulary.
H, F, QUERIES, KEYS, HEAD, LAYERS, V = 3584, 18944, 28, 4, 128, 28, 152064
LONGEST = 1024 + 8192
MIB = 2**20


def shard(tp: int) -> int:
    """Return the count of the numbers of one of `tp` shards."""
    qkv = (QUERIES + 2 * KEYS) * HEAD
    cut = 2 * V * H + LAYERS * (qkv * (H + 1) + H * QUERIES * HEAD + 3 * H * F)
    return cut // tp + LAYERS * 2 * H + H


def drafter_numbers(draft_vocab: int, width: int) -> int:
    """fc, attention on twice the hidden size, MLP, output layer and four norms of an EAGLE-3 drafter."""
    attention = 2 * H * (QUERIES + 2 * KEYS) * HEAD + QUERIES * HEAD * H
    return 3 * H * H + attention + 3 * H * width + draft_vocab * H + 4 * H


def expected_parts(recompute: bool, draft_vocab: int, muon: bool) -> dict[str, int]:
    """The bytes of the 1-node configuration: tp 2, dp 4, ZeRO-2, one sample a micro-batch, scored 1,024 at a time."""
    numbers, width = shard(2), F
    norms = 2 * (4 + 2 * 2) * H
    layer = norms + 2 * (4 * QUERIES * HEAD + 3 * KEYS * HEAD + 4 * F) // 2
    layers = LAYERS * 2 * H + layer if recompute else LAYERS * layer
    drafter = drafter_numbers(draft_vocab, width)
    step = 50 * H + 6 * QUERIES * HEAD + 4 * KEYS * HEAD + 8 * width
    moments = drafter + (draft_vocab * H if muon else drafter)
    share = -(-numbers // 4)
    return {
        "trainer: CUDA, NCCL": 1536 * MIB,
        "actor: weights": 2 * numbers,
        "actor: optimizer": 12 * share,
        "actor: gradients": 4 * share,
        "actor: buffers of an update": 4 * share + 2 * (V // 2 * H + 50_000_000),
        "actor: activations": LONGEST * (layers + (4 + 2 * 2) * H + 2 * 2 * H),
        "actor: logits": 1024 * V // 2 * (2 * 2 + 3 * 4) + V // 2 * H * 2,
        "resync: buckets": 2 * 256 * MIB,
        "learner: drafter, optimizer": 4 * (3 * drafter + moments),
        "learner: activations": LONGEST * (5 * step + 20 * H + 4 * draft_vocab),
        "engine: CUDA, graphs": 2560 * MIB,
        "engine: weights": 2 * shard(1),
        "engine: one pass": max(8192 * (3 * F + 4 * H) * 2, 128 * 4 * V * (2 + 8)),
        "engine: drafter": 2 * drafter,
    }


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ([], (True, 32000, True)),
        (["actor.recompute=false", "drafter.matrix_lr=null"], (False, 32000, False)),
    ],
)
def test_every_part_is_its_formula(overrides, settings):
    (memory,) = plan(*overrides)
    parts = {part.name: part.bytes for part in memory.parts}
    cache = parts.pop("engine: key/value cache")
    assert parts == expected_parts(*settings)
    # sglang gives weights and cache 60 % of what is free besides the engine's own reserve.
    free = 80 * GB - parts["trainer: CUDA, NCCL"] - parts["learner: drafter, optimizer"] - parts["engine: CUDA, graphs"]
    room = int(0.6 * free) - parts["engine: weights"] - parts["engine: drafter"]
    cell = (LAYERS + 1) * 2 * KEYS * HEAD * 2
    assert memory.pool_tokens == room // cell and cache == memory.pool_tokens * cell
    assert (memory.longest, memory.gpu, memory.name) == (LONGEST, 80 * GB, "trains and generates")


def test_the_phases_of_every_part():
    (memory,) = plan()
    assert {part.name: "".join(phase[0] for phase in part.phases) for part in memory.parts} == {
        "trainer: CUDA, NCCL": "gtr",
        "actor: weights": "tr",
        "actor: optimizer": "t",
        "actor: gradients": "t",
        "actor: buffers of an update": "t",
        "actor: activations": "t",
        "actor: logits": "t",
        "resync: buckets": "r",
        "learner: drafter, optimizer": "gtr",
        "learner: activations": "g",
        "engine: CUDA, graphs": "gtr",
        "engine: weights": "gr",
        "engine: one pass": "g",
        "engine: drafter": "gr",
        "engine: key/value cache": "g",
    }
    (waits,) = plan("drafter.mode=sync")
    assert [part.phases for part in waits.parts if part.name == "learner: activations"] == [("train",)]


def test_sequence_parallelism_and_the_drafter_s_own_vocabulary():
    (memory,) = plan("actor.parallel.sequence_parallel=true")
    parts = {part.name: part.bytes for part in memory.parts}
    layer = 2 * 8 * H // 2 + 2 * (4 * QUERIES * HEAD + 3 * KEYS * HEAD + 4 * F) // 2
    assert parts["actor: activations"] == LONGEST * (LAYERS * 2 * H + layer + 8 * H + 4 * H)
    config = load_config(CONFIGS / "qwen2.5-7b-1node.yaml", ["speculation.draft_tokens=4"])
    layout = plan_layout(config, Cluster(1, 8, "cuda"))
    (small,) = plan_memory(config, config_of("7b"), layout, 80 * GB, draft_vocab=6400)
    assert {part.name: part.bytes for part in small.parts}["engine: drafter"] == 2 * drafter_numbers(6400, F)


def test_phases_that_do_not_fit_are_named_with_their_remedies():
    config = load_config(CONFIGS / "qwen2.5-7b-1node.yaml")
    for gpu, phases in ((80, []), (20, ["generate", "train", "resync"])):
        (memory,) = plan_memory(config, config_of("7b"), plan_layout(config, Cluster(1, 8, "cuda")), gpu * GB)
        texts = memory.problems()
        told = [text for text in texts if "phase" in text]
        assert [text.partition("phase ")[2].split()[0] for text in told] == phases
        for text, phase in zip(told, phases, strict=True):
            start = f"memory: on a GPU that trains and generates, phase {phase} takes {memory.total(phase) / GB:.1f} of"
            assert text.startswith(f"{start} {gpu} GB; lower ")
        assert len(texts) - len(told) == (gpu == 20), "and a cache smaller than a sample"


def test_what_just_fits_is_no_problem():
    (memory,) = plan()
    exact = replace(memory, gpu=max(memory.total(phase) for phase in ("generate", "train", "resync")))
    assert exact.problems() == [] and len(replace(exact, gpu=exact.gpu - 1).problems()) == 1
    assert replace(memory, pool_tokens=LONGEST).problems() == []
    assert replace(memory, pool_tokens=None).problems() == []
    (text,) = replace(memory, pool_tokens=LONGEST - 1).problems()
    assert text.startswith("memory: the key/value cache holds 9215 tokens, but a sample may have 9216; raise")


def test_the_learner_s_memory_must_hold_what_one_update_takes():
    def problems(megabytes: int, *overrides: str) -> list[str]:
        config = load_config(CONFIGS / "qwen2.5-7b-1node.yaml", [f"drafter.memory_mb={megabytes}", *overrides])
        sizes = drafter_sizes(config, config_of("7b"), None)
        return learner_problems(config, sizes, plan_layout(config, Cluster(1, 8, "cuda")), LONGEST)

    drafter = drafter_numbers(32000, F)
    rows = 32 // 8  # of an update's responses, on each of eight ranks
    fixed = 4 * (3 * drafter + drafter + 32000 * H)
    snapshot = (32000 + min(rows * LONGEST, V)) * H * 2
    needed = -(-(fixed + rows * LONGEST * (4 * H * 2 + 12) + snapshot) // MIB)
    assert problems(needed) == []
    (text,) = problems(needed - 1)
    assert (
        text.startswith(f"drafter.memory_mb={needed - 1} is less than the {needed} MB") and "4 responses of 92" in text
    )
    assert len(problems(needed, "drafter.compare_frozen=true")) == 1, "the first drafter is kept too"
    assert problems(1, "drafter.weighting=none") == []
    assert problems(1, "drafter.weighting=none", "speculation.algorithm=none") == []


@pytest.mark.parametrize(("algorithm", "drafted"), [("eagle3", 4), ("none", 1)])
def test_a_large_batch_needs_more_for_logits_than_a_prompt_for_its_pass(algorithm, drafted):
    shape = ["drafter.weighting=none"] if algorithm == "none" else []
    (memory,) = plan("rollout.engine.max_running_requests=1024", f"speculation.algorithm={algorithm}", *shape)
    parts = {part.name: part for part in memory.parts}
    assert parts["engine: one pass"].bytes == 1024 * drafted * V * (2 + 4 + 4)
    assert parts["engine: one pass"].how == f"8192 tokens or {1024 * drafted} logits"
