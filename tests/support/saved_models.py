"""Checkpoints as training saves them, without training: float32 weights and moments, cut as ZeRO cuts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from respec_trainer.checkpoint.new_folder import carry_over
from respec_trainer.convert.convert import write_meta
from respec_trainer.weights.hf_folder import HFFolder
from respec_trainer.weights.hf_map import hf_model_shapes, megatron_shapes, megatron_shard
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer

KINDS = ("master", "exp_avg", "exp_avg_sq")


def save_hf(folder: Path, family: str = "qwen2", tied: bool = False, dtype=torch.float32, shards: int = 2, **changes):
    """Save a tiny Hugging Face model with a tokenizer and a generation config; return its folder and config."""
    config = tiny_config(family, tied, layers=1, **changes)
    save_tiny_model(folder, config, dtype=dtype, shards=shards)
    tiny_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder, config


def random_state(config) -> dict[str, dict[str, torch.Tensor]]:
    """Return random float32 tensors under Hugging Face names, by kind."""
    generator = torch.Generator().manual_seed(7)
    shapes = hf_model_shapes(config)
    return {kind: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for kind in KINDS}


def save_checkpoint(folder: Path, hf: Path, config, state, tp: int = 2, dp: int = 3, dtype: str = "bf16") -> Path:
    """Save a run's checkpoint of `state`. Every data-parallel rank has a fragment of each shard; some are empty."""
    (folder / "actor").mkdir(parents=True)
    carry_over(hf, folder / "hf")
    for t in range(tp):
        files: list[dict[str, torch.Tensor]] = [{} for _ in range(dp)]
        for kind, tensors in state.items():
            for name in megatron_shapes(config, tp):
                flat = megatron_shard(name, lambda n, i, held=tensors: held[n][i], config, t, tp).reshape(-1)
                cuts = [0, *(len(flat) * (rank + 1) // (dp + 1) for rank in range(dp - 1)), len(flat)]
                if kind == "master" and dp > 1:
                    cuts[1] = 0  # ZeRO may give a rank no part of a parameter
                for rank in range(dp):
                    files[rank][f"{kind}/{name}/{cuts[rank]}"] = flat[cuts[rank] : cuts[rank + 1]].clone()
        for rank, tensors in enumerate(files):
            save_file(tensors, folder / f"actor/tp{t}_dp{rank}.safetensors")
    (folder / "state.json").write_text('{"step": 40}')
    (folder / "ranks").mkdir()
    for rank in range(tp * dp):
        save_file({"rng": torch.full((3,), rank)}, folder / f"ranks/rank{rank}.safetensors")
    model = json.loads((hf / "config.json").read_text())
    meta = {"step": 40, "tp": tp, "dp": dp, "zero": 2, "dtype": dtype, "optimizer": "exp_avg" in state, "model": model}
    write_meta(folder, meta, config, {})
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with HFFolder(folder) as files:
        return {name: files.read(name).clone() for name in files.names()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether names, shapes, dtypes and every bit are equal."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )
