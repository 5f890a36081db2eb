"""Digests of the weights an engine holds, one for each tensor as it was sent.

Runs inside sglang's scheduler, in place of its own checksums: those are of sglang's fused tensors, which nobody sends,
and need CUDA. Here a fused tensor is taken apart into the rows that were sent by name, and padding is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and every bit."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".removeprefix("torch.")
    return head + hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_hooks() -> dict[str, tuple[Any, str]]:
    """For `sglang_plugin`: target -> (function, kind of hook)."""
    return {"sglang.srt.utils.weight_checker.WeightChecker._compute_checksum": (_checksums, "REPLACE")}


def named_parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of one of sglang's models on one device, under the names of unfused ones."""
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if leaf in FUSED:
                for part, rows in zip(FUSED[leaf], _split(module, leaf, parameter), strict=True):
                    yield f"{parent}.{part}.{name}", rows
            else:
                rows = getattr(module, "org_vocab_size", None)  # a vocabulary is padded to a multiple of 64
                yield f"{path}.{name}", parameter[:rows]


def _split(module: torch.nn.Module, leaf: str, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if leaf == "qkv_proj":
        return parameter.split([module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size])
    return parameter.chunk(2)


def _checksums(checker: Any, _skip_tensor_list: Any = None, *, role: str) -> dict[str, Any]:
    return {
        "checksums": {name: digest(tensor) for name, tensor in named_parts(checker._get_model())},
        "per_gpu_checksum": "",
        "parallelism_info": checker._parallelism_info(role=role).model_dump(),
    }
