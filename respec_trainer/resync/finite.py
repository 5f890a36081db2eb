"""Refuse weights that are not finite before any of them is sent, so that engines keep the last good ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch

CHUNK = 1 << 20  # elements looked at together: few enough for the processor's cache
# Exponents that mark infinities and NaNs. Bits are compared, because that is several times as fast as floats.
BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


def first_non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None where there is none."""
    return next((name for name, tensor in named if not _is_finite(tensor.detach())), None)


def local_weights(module: torch.nn.Module, zero3: bool) -> Iterable[tuple[str, torch.Tensor]]:
    """What this rank holds of each parameter."""
    for name, parameter in module.named_parameters():
        if not zero3:
            yield name, parameter
        elif parameter.ds_tensor.numel():
            part = parameter.ds_tensor  # the last ranks' parts end in padding, which may be anything
            start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
            yield name, part[: max(0, parameter.ds_numel - start)]


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in BITS:
        return bool(tensor.isfinite().all())
    integer, infinity = BITS[tensor.dtype]
    magnitude = torch.iinfo(integer).max  # without the sign
    flat = tensor.contiguous().view(-1).view(integer)
    largest = [(part & magnitude).amax() for part in flat.split(CHUNK) if len(part)]
    return not largest or bool((torch.stack(largest) < infinity).all())
