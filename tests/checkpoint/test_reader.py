"""FragmentReader: any range of any shard, saved at any layout, against the Hugging Face weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from respec_trainer.checkpoint.files import write_tensors
from respec_trainer.checkpoint.fragments import file_name, fragment_key
from respec_trainer.checkpoint.reader import FragmentReader
from respec_trainer.errors import ConfigError
from respec_trainer.weights.hf_map import megatron_shapes, megatron_shard
from tests.support.models import tiny_config, tiny_model

FAMILIES = [("qwen2", True), ("qwen3", False), ("llama", False)]


@pytest.fixture(scope="module", params=FAMILIES, ids=["qwen2-tied", "qwen3", "llama"])
def model(request):
    """Return the config of a tiny model and a reader of its weights."""
    family, tied = request.param
    config = tiny_config(family, tied)
    weights = {name: weight.detach() for name, weight in tiny_model(config).named_parameters()}
    return config, lambda name, index: weights[name][index] if index else weights[name]


def save(folder: Path, model, tp: int, dp: int, seed: int = 0) -> dict:
    """Write every shard, cut at random positions over `dp` files; return the part of meta.json that a reader needs."""
    config, read = model
    draws = random.Random(seed)
    (folder / "actor").mkdir()
    shapes = megatron_shapes(config, tp)
    for tp_rank in range(tp):
        files: list[dict] = [{} for _ in range(dp)]
        for name in shapes:
            flat = megatron_shard(name, read, config, tp_rank, tp).flatten()
            cuts = [0, *sorted(draws.randint(0, len(flat)) for _ in range(dp - 1)), len(flat)]
            for file, start, stop in zip(files, cuts, cuts[1:], strict=False):
                if stop > start:  # a rank may own nothing of a parameter
                    file[fragment_key("master", name, start)] = flat[start:stop]
        for dp_rank, tensors in enumerate(files):
            write_tensors(folder / file_name(tp_rank, dp_rank), tensors)
    return {"tp": tp, "dp": dp, "parameters": {name: list(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize(("saved", "dp"), [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_every_stretch_is_that_of_the_hugging_face_weights(tmp_path, model, saved, dp):
    config, read = model
    meta, draws = save(tmp_path, model, saved, dp), random.Random(1)
    for tp in (1, 2, 4):
        for rank in range(tp):
            reader = FragmentReader(tmp_path, meta, config, rank, tp)
            for name, shape in megatron_shapes(config, tp).items():
                expected = megatron_shard(name, read, config, rank, tp).flatten()
                size = len(expected)
                places = [(0, size), *(sorted(draws.sample(range(size + 1), k=2)) for _ in range(4))]
                for start, stop in places:
                    found = reader.read("master", name, shape, start, stop - start)
                    assert torch.equal(found, expected[start:stop]), (name, tp, rank, start, stop)


def test_what_is_not_there_is_named(tmp_path, model):
    config, _ = model
    meta = save(tmp_path, model, 1, 2)
    reader = FragmentReader(tmp_path, meta, config, 0, 1)
    name, shape = "decoder.final_layernorm.weight", (64,)
    with pytest.raises(ConfigError, match=f"lacks exp_avg of {name} from entry 3 on, of tp rank 0"):
        reader.read("exp_avg", name, shape, 3, 2)
    with pytest.raises(ConfigError, match=f"lacks master of {name} from entry 64 on"):
        reader.read("master", name, shape, 60, 10)
    with pytest.raises(ConfigError, match=rf"{name} is of shape \[64\] there, but \[65\]"):
        reader.read("master", name, (65,), 0, 5)


def test_a_gap_between_fragments_is_named(tmp_path):
    name = "decoder.final_layernorm.weight"
    (tmp_path / "actor").mkdir()
    parts = {fragment_key("master", name, start): torch.zeros(20) for start in (0, 44)}
    write_tensors(tmp_path / file_name(0, 0), parts)
    meta = {"tp": 1, "dp": 1, "parameters": {name: [64]}}
    reader = FragmentReader(tmp_path, meta, tiny_config("llama"), 0, 1)
    assert len(reader.read("master", name, (64,), 44, 20)) == 20
    with pytest.raises(ConfigError, match="from entry 20 on"):
        reader.read("master", name, (64,), 0, 64)
