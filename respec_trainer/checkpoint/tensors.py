"""Tensors by Hugging Face name, from a Hugging Face folder or a checkpoint: for loading, converting, comparing."""

from __future__ import annotations

from collections.abc import KeysView
from pathlib import Path
from typing import Protocol

import torch

from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.meta import is_checkpoint
from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import head_weights
from respec_trainer.weights import hf_map
from respec_trainer.weights.hf_folder import HFFolder, some

# Tensors that some exporters add: RoPE's frequencies, which follow from the config, and a head tied to the embedding.
IGNORED = ("rotary_emb.inv_freq", *head_weights())


class Tensors(Protocol):
    """An HFFolder, or one kind of a checkpoint's state with the same interface."""

    folder: Path

    def names(self) -> set[str] | KeysView[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor: ...


class CheckpointTensors:
    """One kind of a checkpoint's state (weights, or a moment of AdamW) under Hugging Face names, in their shapes.

    A Megatron parameter is assembled when one of its tensors is read, and kept until a tensor of another parameter or
    kind is read; so read in the order of `names`. Use it in a `with` statement, like HFFolder. Raises ConfigError if
    the checkpoint's parameters are not those of its model.
    """

    def __init__(self, checkpoint: MegatronFolder, hf_config, kind: str | None = None):
        """`kind`: None stands for the weights, in float32 if the checkpoint has them."""
        self.folder, self.checkpoint, self.hf_config = checkpoint.folder, checkpoint, hf_config
        self.kind = kind or checkpoint.kinds[0]
        _check_parameters(checkpoint, hf_config)
        self._parameter_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in checkpoint.shapes.items():
            sources = hf_map.hf_shapes(name, shape, hf_config, checkpoint.tp)
            self._shapes |= sources
            self._parameter_of |= dict.fromkeys(sources, name)
        self._held: dict[tuple[str, str], torch.Tensor] = {}  # by kind and name; shared by the kinds

    def names(self) -> KeysView[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.kind_dtype(self.kind)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the part of tensor `name` that `index` selects; all of it for ()."""
        key = self.kind, name
        if key not in self._held:
            self._held.clear()  # before the next ones are made, so that both are never in memory together
            made = self._assemble(self._parameter_of[name])
            self._held |= {(self.kind, each): tensor for each, tensor in made.items()}
        return self._held[key][index] if index else self._held[key]

    def of_kind(self, kind: str) -> CheckpointTensors:
        """Return another kind of the same checkpoint's state."""
        other = CheckpointTensors(self.checkpoint, self.hf_config, kind)
        other._held = self._held
        return other

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(self, *_) -> None:
        self._held.clear()

    def _assemble(self, parameter: str) -> dict[str, torch.Tensor]:
        shards = [self.checkpoint.shard(self.kind, parameter, t) for t in range(self.checkpoint.tp)]
        if hf_map.parameter_layout(parameter, self.hf_config, len(shards)).dim is None:
            _check_replicas(parameter, shards, self.folder)
        views = hf_map.hf_views(parameter, shards[0], self.hf_config) if len(shards) == 1 else None
        return views or dict(hf_map.to_hf(parameter, shards, self.hf_config))


def open_tensors(folder: Path | str, hf_config) -> HFFolder | CheckpointTensors:
    """Open the weights in a Hugging Face folder or a checkpoint."""
    if is_checkpoint(folder):
        return CheckpointTensors(MegatronFolder(folder), hf_config)
    return HFFolder(folder)


def check_contents(tensors: Tensors, hf_config, key: str = "") -> None:
    """Raise ConfigError unless `tensors` are exactly those of the model of `hf_config`, in its shapes.

    `key` begins the message: the configuration key that names the folder.
    """
    expected = hf_map.hf_model_shapes(hf_config)
    missing = expected.keys() - tensors.names()
    unknown = {name for name in tensors.names() - expected.keys() if not name.endswith(IGNORED)}
    for problem, names in (("lack", missing), ("hold, with no place in the model,", unknown)):
        if names:
            raise ConfigError(
                f"{key}the weights in {tensors.folder} {problem} {some(names)}; does config.json belong to them?"
            )
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise ConfigError(
                f"{key}{name} in {tensors.folder} is of shape {tensors.shape(name)}, but config.json makes it {shape}"
            )


def _check_parameters(checkpoint: MegatronFolder, hf_config) -> None:
    expected, held = hf_map.megatron_shapes(hf_config, checkpoint.tp), checkpoint.shapes
    wrong = {name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)}
    for name in sorted(wrong)[:1]:
        raise ConfigError(
            f"{checkpoint.folder}: shards of {name} are of shape {held.get(name)} in meta.json, but hf/config.json "
            f"makes them {expected.get(name)} at tp={checkpoint.tp}; they are not of one model"
        )


def _check_replicas(parameter: str, shards: list[torch.Tensor], folder: Path) -> None:
    """Raise ConfigError if the replicas of a parameter that is not cut differ: the run that wrote them had a fault."""
    for rank, shard in enumerate(shards):
        if not torch.equal(shard.view(torch.uint8), shards[0].view(torch.uint8)):
            raise ConfigError(
                f"{folder}: {parameter}, which is not cut, differs between tensor-parallel ranks 0 and {rank}; the run "
                f"that wrote it went wrong before this checkpoint"
            )
