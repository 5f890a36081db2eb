"""Write the trained actor as a Hugging Face folder that transformers and SGLang load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from respec_trainer.resync.stream import ActorStream
from respec_trainer.resync.workspace import Workspace

SHARD_BYTES = 4 << 30
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def export_actor(actor, source: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `actor`'s weights to `out`, with config, tokenizer and the rest carried over from `source`.

    Every rank must call it; rank 0 writes, shard by shard, beside `out` and renames at the end: `out` is complete or
    absent. Raises FileExistsError if `out` exists.
    """
    writes = actor.topology.rank == 0
    beside = out.with_name(out.name + ".partial")
    if writes:
        if out.exists():
            raise FileExistsError(f"{out} exists; move it away, nothing is overwritten")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
    shards: list[list[str]] = []
    total = 0
    dtype, workspace = next(actor.engine.module.parameters()).dtype, Workspace(actor.topology.device)
    for gathered in ActorStream(actor, [0], shard_bytes, dtype, workspace):
        if writes:
            tensors = {name: tensor.cpu() for name, tensor in gathered.copy(workspace)}
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            save_file(tensors, beside / _partial_name(len(shards)), metadata={"format": "pt"})
            shards.append(list(tensors))
    if writes:
        _name_shards(beside, shards, total)
        _set_dtype(beside / "config.json", dtype)
        beside.rename(out)


def _partial_name(index: int) -> str:
    return f"shard-{index}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards the names transformers looks for, now that their number is known, and write the index."""
    if len(shards) == 1:
        (folder / _partial_name(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _partial_name(index)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2))
