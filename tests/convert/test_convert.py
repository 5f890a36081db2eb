"""convert/convert.py: conversion there and back is exact for any layout, and leaves no incomplete output."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.progress import Silent
from respec_trainer.checkpoint.tensors import CheckpointTensors
from respec_trainer.convert import convert as conversion
from respec_trainer.convert.convert import checkpoint_to_hf, copy_drafter, reshard, to_megatron
from respec_trainer.convert.verify import compare_folders
from respec_trainer.drafter.format import load_drafter, save_drafter
from respec_trainer.errors import ConfigError, RespecError
from respec_trainer.models.registry import FAMILIES
from respec_trainer.weights.hf_folder import HFFolder
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.saved_models import random_state, read_all, same, save_checkpoint, save_hf

QUIET = Silent()


@pytest.fixture
def hf(tmp_path):
    return save_hf(tmp_path / "hf")


@pytest.mark.parametrize(("family", "tied"), itertools.product(FAMILIES, (False, True)))
@pytest.mark.parametrize("tp", [1, 2, 4])  # two key/value heads, a vocabulary of 131
def test_round_trip_is_bit_equal(tmp_path, family, tied, tp):
    source, config = save_hf(tmp_path / "hf", family, tied, torch.bfloat16)
    to_megatron(source, config, tmp_path / "megatron", tp, None, QUIET)
    checkpoint = MegatronFolder(tmp_path / "megatron")
    assert (checkpoint.tp, checkpoint.dtype, checkpoint.kinds) == (tp, torch.bfloat16, ("weight",))
    checkpoint_to_hf(checkpoint, config, tmp_path / "back", torch.bfloat16, QUIET, limit=40_000)
    before, after = read_all(source), read_all(tmp_path / "back")
    assert same(before, after)
    assert ("lm_head.weight" in after) == (not tied)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back"}


def test_transformers_loads_what_is_written(tmp_path, hf):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source, config = hf
    to_megatron(source, config, tmp_path / "megatron", 2, None, QUIET)
    out = tmp_path / "back"
    checkpoint_to_hf(MegatronFolder(tmp_path / "megatron"), config, out, torch.bfloat16, QUIET, limit=40_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    loaded, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
    assert loaded.dtype == torch.bfloat16
    assert same(dict(loaded.state_dict()), {name: t.bfloat16() for name, t in original.state_dict().items()})
    assert AutoTokenizer.from_pretrained(out).encode("a") == AutoTokenizer.from_pretrained(source).encode("a")
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 2), (4, 3)])
def test_a_trained_checkpoint_gives_its_float32_weights_rounded(tmp_path, hf, tp, dp):
    source, config = hf
    state = random_state(config)
    checkpoint = MegatronFolder(save_checkpoint(tmp_path / "step_40", source, config, state, tp, dp))
    checkpoint_to_hf(checkpoint, config, tmp_path / "bf16", torch.bfloat16, QUIET)
    assert same(read_all(tmp_path / "bf16"), {name: t.bfloat16() for name, t in state["master"].items()})
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    checkpoint_to_hf(checkpoint, config, tmp_path / "fp32", torch.float32, QUIET)
    assert same(read_all(tmp_path / "fp32"), state["master"])


@pytest.mark.parametrize(("tp", "to"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_resharding_keeps_weights_and_moments(tmp_path, hf, tp, to):
    source, config = hf
    state = random_state(config)
    before = MegatronFolder(save_checkpoint(tmp_path / "step_40", source, config, state, tp, 2))
    reshard(before, config, tmp_path / "new", to, QUIET)
    after = MegatronFolder(tmp_path / "new")
    after.check_digests(QUIET)
    assert (after.tp, after.meta["dp"], after.meta["step"], after.meta["optimizer"]) == (to, 1, 40, True)
    for kind, tensors in state.items():
        view = CheckpointTensors(after, config, kind)
        assert same({name: view.read(name) for name in view.names()}, tensors)
    comparison = compare_folders(CheckpointTensors(before, config), CheckpointTensors(after, config), QUIET)
    assert comparison.within(0)
    assert comparison.common == comparison.equal == 3 * len(state["master"])
    carried = ("state.json", "hf/config.json", "ranks/rank0.safetensors")
    assert all((tmp_path / "new" / name).read_bytes() == (before.folder / name).read_bytes() for name in carried)
    assert set(carried) <= after.meta["files"].keys()


@pytest.mark.parametrize(("tp", "dp", "to"), [(1, 1, 4), (2, 3, 2), (2, 1, 4)])
def test_every_rank_of_the_new_layout_finds_a_state(tmp_path, hf, tp, dp, to):
    source, config = hf
    before = MegatronFolder(save_checkpoint(tmp_path / "step_40", source, config, random_state(config), tp, dp))
    reshard(before, config, tmp_path / "new", to, QUIET)
    ranks = tmp_path / "new" / "ranks"
    assert {path.name for path in ranks.iterdir()} == {f"rank{rank}.safetensors" for rank in range(to)}
    for rank in range(to):
        assert load_file(ranks / f"rank{rank}.safetensors")["rng"][0] == rank % (tp * dp)


def test_a_wrong_moment_shows(tmp_path, hf):
    source, config = hf
    state = random_state(config)
    first = save_checkpoint(tmp_path / "first", source, config, state)
    state["exp_avg"]["model.norm.weight"][3] += 1
    second = save_checkpoint(tmp_path / "second", source, config, state)
    views = [CheckpointTensors(MegatronFolder(folder), config) for folder in (first, second)]
    (difference,) = compare_folders(*views, QUIET).differences
    assert difference.name == "exp_avg/model.norm.weight"
    assert difference.largest == pytest.approx(1, abs=1e-6)


def test_a_dtype_can_be_chosen(tmp_path, hf):
    source, config = hf
    to_megatron(source, config, tmp_path / "megatron", 2, torch.bfloat16, QUIET)
    checkpoint = MegatronFolder(tmp_path / "megatron")
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.meta["model"]["dtype"] == "bfloat16"


def test_a_drafter_is_cast_and_stays_one(tmp_path):
    target = target_config("qwen3")
    save_drafter(tiny_drafter(target), DRAFT_IDS, tmp_path / "drafter", torch.float32)
    copy_drafter(tmp_path / "drafter", tmp_path / "out", torch.bfloat16, QUIET)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    drafter, ids = load_drafter(tmp_path / "out", target, dtype=None)
    assert torch.equal(ids, DRAFT_IDS)
    saved = tiny_drafter(target).state_dict()
    assert same(dict(drafter.state_dict()), {name: tensor.bfloat16() for name, tensor in saved.items()})


def test_a_head_that_repeats_the_embedding_is_left_out(tmp_path):
    source, config = save_hf(tmp_path / "hf", tied=True, shards=1)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors")
    to_megatron(source, config, tmp_path / "fine", 1, None, QUIET)
    assert "output_layer.weight" not in MegatronFolder(tmp_path / "fine").shapes
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConfigError, match="unlike model.embed_tokens.weight"):
        to_megatron(source, config, tmp_path / "refused", 1, None, QUIET)


def test_mixed_dtypes_need_a_choice(tmp_path):
    source, config = save_hf(tmp_path / "hf", shards=1)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConfigError, match="bfloat16, float32; .* --dtype"):
        to_megatron(source, config, tmp_path / "out", 1, None, QUIET)
    to_megatron(source, config, tmp_path / "out", 1, torch.float32, QUIET)


class KilledAfter(Silent):
    """Progress that kills this process with SIGKILL after a number of tensors."""

    def __init__(self, count: int):
        self.left = count

    def advance(self, size: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_killed_on_the_way_it_leaves_nothing_that_looks_done(tmp_path, hf, count):
    source, config = hf
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(
        target=to_megatron, args=(source, config, out, 2, None, KilledAfter(count))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    to_megatron(source, config, out, 2, None, QUIET)
    MegatronFolder(out).check_digests(QUIET)
    assert not list(tmp_path.glob(".out.partial-*"))


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, hf, monkeypatch):
    source, config = hf

    class Full(conversion.SafetensorsWriter):
        def write(self, name, tensor):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "SafetensorsWriter", Full)
    with pytest.raises(RespecError, match="is full"):
        to_megatron(source, config, tmp_path / "out", 2, None, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Counted:
    """Progress that is kept: for each phase, what was announced and what was done, in bytes."""

    def __init__(self):
        self.phases: list[list] = []

    def begin(self, what, total):
        self.phases.append([what, total, 0])

    def advance(self, size):
        self.phases[-1][2] += size


def test_a_bar_ends_where_it_said_it_would(tmp_path, hf):
    source, config = hf
    bar = Counted()
    to_megatron(source, config, tmp_path / "megatron", 2, None, bar)
    checkpoint = MegatronFolder(save_checkpoint(tmp_path / "step_40", source, config, random_state(config)))
    reshard(checkpoint, config, tmp_path / "resharded", 1, bar)
    checkpoint_to_hf(checkpoint, config, tmp_path / "back", torch.bfloat16, bar)
    checkpoint.check_digests(bar)
    save_drafter(tiny_drafter(), DRAFT_IDS, tmp_path / "drafter", torch.float32)
    copy_drafter(tmp_path / "drafter", tmp_path / "copy", torch.bfloat16, bar)
    with HFFolder(source) as one, HFFolder(source) as other:
        compare_folders(one, other, bar)
    assert [what for what, *_ in bar.phases] == [
        "Megatron", "Megatron", "Hugging Face", "checksums", "drafter", "comparing"
    ]  # fmt: skip
    assert all(total == done > 1000 for _, total, done in bar.phases), bar.phases


def test_frequencies_of_another_dtype_do_not_make_a_model_one_of_two_dtypes(tmp_path):
    source, config = save_hf(tmp_path / "hf", dtype=torch.bfloat16, shards=1)
    held = load_file(source / "model.safetensors")
    save_file(held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, source / "model.safetensors")
    to_megatron(source, config, tmp_path / "megatron", 1, None, QUIET)
    assert MegatronFolder(tmp_path / "megatron").dtype == torch.bfloat16
    save_file(held | {"model.norm.weight": torch.ones(64)}, source / "model.safetensors")
    with pytest.raises(ConfigError, match="are of bfloat16, float32; a checkpoint has one of bf16 and fp32"):
        to_megatron(source, config, tmp_path / "two", 1, None, QUIET)


def test_files_have_four_gibibytes_at_most_by_default():
    assert conversion.SHARD_BYTES == 4 * 2**30
