"""Compares two models: their weights, name by name, and their logits for a few tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from respec_trainer.checkpoint.progress import Progress
from respec_trainer.checkpoint.tensors import IGNORED, CheckpointTensors, Tensors
from respec_trainer.dtypes import long_name
from respec_trainer.models.registry import family_of
from respec_trainer.weights.safetensors_io import Spec

CHUNK = 1 << 24  # entries compared at one time, in float32


@dataclass(frozen=True)
class Difference:
    """A difference in one tensor."""

    name: str
    what: str  # "values", or text about dtype, shape or a missing tensor
    largest: float | None  # largest difference of values, in float32; None if they cannot be compared


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two models."""

    common: int  # tensors that both have
    equal: int  # tensors that are equal bit for bit
    differences: list[Difference]

    def within(self, tolerance: float) -> bool:
        """Return whether names and shapes agree, and values within `tolerance`; at 0 also dtypes and every bit."""
        if tolerance == 0:
            return not self.differences
        return all(d.largest is not None and d.largest <= tolerance for d in self.differences)

    def __add__(self, other: Comparison) -> Comparison:
        differences = self.differences + other.differences
        return Comparison(self.common + other.common, self.equal + other.equal, differences)


def compare_folders(first: Tensors, second: Tensors, progress: Progress, tied: bool = False) -> Comparison:
    """Compare two models' weights and, for two checkpoints that have them, AdamW's moments. `tied`: see `compare`."""
    result = compare(first, second, progress, tied)
    if isinstance(first, CheckpointTensors) and isinstance(second, CheckpointTensors):
        for kind in first.checkpoint.kinds[1:]:
            if kind in second.checkpoint.kinds:
                result += compare(first.of_kind(kind), second.of_kind(kind), progress, tied, f"{kind}/")
    return result


def compare(first: Tensors, second: Tensors, progress: Progress, tied: bool = False, prefix: str = "") -> Comparison:
    """Compare every tensor. RoPE's frequencies, which follow from the config, may be in only one model.

    Args:
        tied: both models tie the output layer to the embedding, so its weights may be in only one model too.
        prefix: the beginning of the names of differences.
    """
    names = _names(first, second, IGNORED if tied else IGNORED[:1])
    common = [name for name in names if name in first.names() and name in second.names()]
    progress.begin("comparing", sum(Spec(first.dtype(name), first.shape(name)).nbytes for name in common))
    alone = [name for name in names if name not in common]
    where = {name: (first if name in first.names() else second).folder for name in alone}
    differences = [Difference(prefix + name, f"only in {folder}", None) for name, folder in where.items()]
    for name in common:
        found = compare_tensor(name, first, second)
        differences += [replace(found, name=prefix + name)] if found else []
        progress.advance(Spec(first.dtype(name), first.shape(name)).nbytes)
    return Comparison(len(common), len(common) - len(differences) + len(alone), differences)


def compare_tensor(name: str, first: Tensors, second: Tensors) -> Difference | None:
    """Return the difference of two tensors; None if shape, dtype and every bit are equal."""
    if first.shape(name) != second.shape(name):
        return Difference(name, f"shape: {list(first.shape(name))} and {list(second.shape(name))}", None)
    dtypes = [long_name(tensors.dtype(name)) for tensors in (first, second)]
    a, b = (tensors.read(name).contiguous().view(-1) for tensors in (first, second))
    if dtypes[0] != dtypes[1]:
        return Difference(name, f"dtype: {dtypes[0]} and {dtypes[1]}", largest_difference(a, b))
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return None
    return Difference(name, "values", largest_difference(a, b))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest |a - b| of two tensors [N], in float32; NaN if one contains NaN."""
    largest = 0.0
    for start in range(0, len(a), CHUNK):
        part = (a[start : start + CHUNK].float() - b[start : start + CHUNK].float()).abs().max().item()
        largest = math.nan if math.isnan(part) or math.isnan(largest) else max(largest, part)
    return largest


def _names(first: Tensors, second: Tensors, ignored: tuple[str, ...]) -> list[str]:
    """Return all names, in the order of a checkpoint, without names in only one model that may be ignored."""
    ordered = next((t.names() for t in (first, second) if isinstance(t, CheckpointTensors)), ())
    everything = dict.fromkeys(ordered) | dict.fromkeys(sorted(first.names() | second.names()))
    in_both = first.names() & second.names()
    return [name for name in everything if name in in_both or not name.endswith(ignored)]


class WeightsInFloat32(Mapping):
    """A mapping of a model's tensors for accelerate, which reads each tensor when it is requested, in float32."""

    def __init__(self, tensors: Tensors, hf_config):
        names = family_of(hf_config).names
        self.tensors = tensors
        self._stored_as = {names.head_weight: names.embedding_weight} if hf_config.tie_word_embeddings else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors.read(self._stored_as.get(name, name)).float()

    def __iter__(self):
        return iter(self.tensors.names())

    def __len__(self) -> int:
        return len(self.tensors.names())


@torch.no_grad()
def logits_of(tensors: Tensors, hf_config, tokens: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits [B, S, V] of tokens [B, S], in float32 on the CPU, with one module in memory."""
    from accelerate import cpu_offload, init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # RoPE's frequencies come from the config, not from files
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")
    weights = WeightsInFloat32(tensors, hf_config)
    cpu_offload(model.eval(), execution_device=torch.device("cpu"), state_dict=weights)
    return model(tokens, use_cache=False).logits


def sample_tokens(hf_config, length: int) -> torch.Tensor:
    """Return random tokens [2, length] from the whole vocabulary, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, hf_config.vocab_size, (2, length), generator=generator)
