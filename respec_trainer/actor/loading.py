"""Loads this rank's shards of a Hugging Face folder's or a checkpoint's weights into a policy model."""

from __future__ import annotations

from pathlib import Path

import torch

from respec_trainer.actor.parallel import Topology
from respec_trainer.checkpoint.tensors import check_contents, open_tensors
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.weights.hf_map import megatron_shard


def load_hf_config(folder: str | Path):
    """Return the Hugging Face config in `folder`."""
    define_torchvision_operators()
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@torch.no_grad()
def load_weights(model: torch.nn.Module, hf_config, folder: str | Path, topology: Topology) -> None:
    """Copy this rank's shards into `model`, in its dtype and on its device, from a Hugging Face folder or a checkpoint.

    Raises ConfigError if the folder lacks a tensor, or has one that is not in this model or that has another shape
    than in the config.
    """
    with open_tensors(folder, hf_config) as tensors:
        check_contents(tensors, hf_config, "model.path: ")
        for name, parameter in model.named_parameters():
            parameter.copy_(megatron_shard(name, tensors.read, hf_config, topology.tp_rank, topology.tp))
