"""Fill a policy model with the shards it holds of a Hugging Face folder's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from respec_trainer.actor.parallel import Topology
from respec_trainer.checkpoint.hf_folder import HFFolder
from respec_trainer.checkpoint.hf_map import megatron_shard, parameter_layout
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.errors import ConfigError

# Tensors some exporters add, which say nothing that the config does not.
IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")


def load_hf_config(folder: str | Path):
    """The Hugging Face config in `folder`."""
    define_torchvision_operators()
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@torch.no_grad()
def load_weights(model: torch.nn.Module, hf_config, folder: str | Path, topology: Topology) -> None:
    """Copy this rank's shards into `model`, in its dtype and on its device.

    Raises ConfigError if the folder lacks a tensor, holds one that this model has no place for, or one of another
    shape than the config says.
    """
    with HFFolder(folder) as files:
        _check_names(model, hf_config, files, topology.tp)
        for name, parameter in model.named_parameters():
            _check_shapes(name, parameter, hf_config, files, topology.tp)
            parameter.copy_(megatron_shard(name, files.read, hf_config, topology.tp_rank, topology.tp))


def _check_names(model: torch.nn.Module, hf_config, files: HFFolder, tp: int) -> None:
    layouts = [parameter_layout(name, hf_config, tp) for name, _ in model.named_parameters()]
    wanted = {segment.source for layout in layouts for segment in layout.segments} - {None}
    missing = sorted(wanted - files.names())
    unknown = sorted(name for name in files.names() - wanted if not name.endswith(IGNORED))
    for problem, names in (("lack", missing), ("hold, with no place in the model,", unknown)):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                f"model.path: the weights in {files.folder} {problem} {some}; does config.json belong to them?"
            )


def _check_shapes(name: str, parameter: torch.nn.Parameter, hf_config, files: HFFolder, tp: int) -> None:
    layout = parameter_layout(name, hf_config, tp)
    whole = layout.extents() or {layout.segments[0].source: None}
    for source, extent in whole.items():
        expected = list(parameter.shape)
        if extent is not None:
            expected[layout.dim] = extent
        if files.shape(source) != tuple(expected):
            raise ConfigError(
                f"model.path: {source} in {files.folder} is of shape {files.shape(source)}, but config.json makes it "
                f"{tuple(expected)}"
            )
