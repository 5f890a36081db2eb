"""Checks that weights are finite before any of them is sent, so that engines keep the last good ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def first_non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity; None if there is none."""
    # The minimum and maximum show both, at the speed of memory. They are read together, with one GPU synchronization.
    named = [(name, tensor.detach()) for name, tensor in named if tensor.numel()]
    if not named:
        return None
    extremes = torch.stack([torch.stack(tensor.aminmax()).float() for _, tensor in named])
    wrong = (~extremes.isfinite()).any(1).nonzero().flatten().tolist()
    return named[wrong[0]][0] if wrong else None


def local_weights(module: torch.nn.Module, zero3: bool) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield this rank's part of each parameter."""
    for name, parameter in module.named_parameters():
        if not zero3:
            yield name, parameter
        elif parameter.ds_tensor.numel():
            part = parameter.ds_tensor  # the last ranks' parts end in padding with undefined values
            start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
            yield name, part[: max(0, parameter.ds_numel - start)]
