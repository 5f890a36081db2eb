"""Digest of a tensor: equal for equal dtype, shape and bits, and computed as fast as memory is read.

It detects accidental differences and is not cryptographic. On a CPU it is XXH3 with 128 bits. On a GPU it is computed
there, in 64-bit integers that wrap around: the sum over words w_i of mix(w_i, i), where `mix` is the finalizer of
MurmurHash3 over the word and its position, so that words that change, move or are swapped change the digest. The
digest's text includes which of the two methods made it.
"""

from __future__ import annotations

import torch
import xxhash

CHUNK = 1 << 24  # words mixed at one time; each takes 8 bytes of temporary memory
POSITION, FIRST, SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: torch.Tensor) -> str:
    """Return the digest of dtype, shape and every bit of `tensor`, computed on the tensor's device."""
    content = tensor.detach().contiguous().view(-1)
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".removeprefix("torch.")
    if content.device.type == "cpu":
        return kind + xxhash.xxh3_128_hexdigest(content.view(torch.uint8).numpy())
    return kind + mixed_sum(content)


def mixed_sum(content: torch.Tensor) -> str:
    """Return the digest that is used on GPUs, of `content` [N] on any device."""
    words = content.view(WORDS[content.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        part += torch.arange(start, start + len(part), device=content.device).add_(1).mul_(POSITION)
        for factor in (FIRST, SECOND):
            part ^= (part >> 33) & 0x7FFFFFFF  # makes the shift logical: torch's shift keeps the sign
            part *= factor
        part ^= (part >> 33) & 0x7FFFFFFF
        total += part.sum()
    return f"sum-{int(total) & 0xFFFFFFFFFFFFFFFF:016x}"
