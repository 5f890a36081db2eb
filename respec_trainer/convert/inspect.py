"""Describes the content of a folder: a checkpoint, a Hugging Face model or a drafter."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from rich.filesize import decimal

from respec_trainer.checkpoint.fragments import ACTOR
from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.meta import is_checkpoint
from respec_trainer.dtypes import long_name
from respec_trainer.weights.hf_folder import HFFolder

Facts = dict[str, str]  # name of a property -> its value


def describe(folder: Path) -> Facts:
    """Return the facts about a folder, from headers and JSON only. Raises ConfigError if it holds none of the three."""
    return _checkpoint(MegatronFolder(folder)) if is_checkpoint(folder) else _hf_folder(folder)


def _checkpoint(checkpoint: MegatronFolder) -> Facts:
    meta, files = checkpoint.meta, checkpoint.meta["files"]
    actor = [facts["bytes"] for name, facts in files.items() if name.startswith(ACTOR)]
    return {
        "format": f"checkpoint, format {meta['format']}",
        "step": str(meta.get("step", 0)),
        "model": _model(meta["model"]),
        "layout": f"tensor parallel {meta['tp']}, data parallel {meta['dp']}, ZeRO {meta.get('zero', 0)}",
        "actor": f"{', '.join(checkpoint.kinds)} of {len(checkpoint.shapes)} parameters in {_files(actor)}",
        "dtype": meta["dtype"],
        "drafter": "yes" if "drafter/config.json" in files else "no",
        "all files": _files([facts["bytes"] for facts in files.values()]),
        "written by": ", ".join(f"{name} {number}" for name, number in meta.get("versions", {}).items()),
    }


def _hf_folder(folder: Path) -> Facts:
    with HFFolder(folder) as files:
        files.check_index()
        shapes = {name: files.shape(name) for name in files.names()}
        dtypes = Counter(long_name(files.dtype(name)) for name in shapes)
        sizes = [(folder / file).stat().st_size for file in files.files()]
    config = folder / "config.json"
    return {
        "format": "Hugging Face folder",
        "model": _model(json.loads(config.read_text())) if config.is_file() else "no config.json",
        "weights": f"{sum(torch.Size(shape).numel() for shape in shapes.values()):,} in {len(shapes)} tensors",
        "dtype": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in sorted(dtypes.items())),
        "files": _files(sizes),
    }


def _model(config: dict) -> str:
    heads = f"{config.get('num_attention_heads')} / {config.get('num_key_value_heads')} heads"
    tied = ", tied embeddings" if config.get("tie_word_embeddings") else ""
    return (
        f"{', '.join(config.get('architectures') or [str(config.get('model_type'))])}: "
        f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}, {heads}, "
        f"vocabulary {config.get('vocab_size')}{tied}"
    )


def _files(sizes: list[int]) -> str:
    return f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}, {decimal(sum(sizes))}"
