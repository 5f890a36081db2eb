"""rollout/sglang/inside/cpu/stand_in/sgl_kernel/hashing.py against MurmurHash3 on bytes."""

from __future__ import annotations

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

put_stand_in_on_path()
from sgl_kernel.hashing import murmur_hash32_cpu  # noqa: E402


def murmur3_32(message: bytes, state: int = 0) -> int:
    """Hash a message of whole 4-byte blocks."""
    low = 0xFFFFFFFF
    for (block,) in struct.iter_unpack("<I", message):
        block = block * 0xCC9E2D51 & low
        block = (block << 15 | block >> 17) & low
        state ^= block * 0x1B873593 & low
        state = (state << 13 | state >> 19) & low
        state = state * 5 + 0xE6546B64 & low
    state ^= len(message)
    state = (state ^ state >> 16) * 0x85EBCA6B & low
    state = (state ^ state >> 13) * 0xC2B2AE35 & low
    return state ^ state >> 16


def test_the_reference_gives_published_values():
    assert murmur3_32(b"test") == 0xBA6BD213
    assert murmur3_32(b"") == 0


row = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31))  # seed, position


@given(st.lists(row, min_size=1), st.lists(st.integers(0, 2**31)))
def test_hash(rows, columns):
    seeds = torch.tensor([seed for seed, _ in rows], dtype=torch.uint64)
    positions = torch.tensor([position for _, position in rows])
    hashed = murmur_hash32_cpu(seeds, positions, torch.tensor(columns, dtype=torch.int64))
    assert hashed.dtype == torch.uint32
    expected = [[murmur3_32(struct.pack("<QII", *row, column)) for column in columns] for row in rows]
    assert hashed.tolist() == expected
