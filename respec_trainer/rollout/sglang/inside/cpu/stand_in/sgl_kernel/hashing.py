"""MurmurHash3 (Austin Appleby, public domain), x86 32-bit variant: random bits as a function of seed and position."""

from __future__ import annotations

import torch

LOW = 0xFFFFFFFF


def murmur_hash32_cpu(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Hash (seed, position, column) to uint32 [rows, columns].

    seed, positions: [rows]. The seed's 64 bits are two blocks of the message; position and column are one each. The
    computation is in int64, where a product's low 32 bits are correct even if the product overflows.
    """
    seed = seed.to(torch.int64)
    state = torch.zeros_like(seed)
    for block in (seed & LOW, (seed >> 32) & LOW, positions.to(torch.int64) & LOW):
        state = _mix(state, block)
    state = _mix(state[:, None], columns.to(torch.int64)[None] & LOW)
    state = state ^ 16  # the message's length in bytes
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & LOW
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & LOW
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _rotate((block * 0xCC9E2D51) & LOW, 15)
    block = (block * 0x1B873593) & LOW
    return (_rotate(state ^ block, 13) * 5 + 0xE6546B64) & LOW


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & LOW
