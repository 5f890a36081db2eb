"""rollout/digest.py: every bit, the shape, the dtype and the order of elements change the digest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.rollout import digest as module
from respec_trainer.rollout.digest import digest, mixed_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def reference(words: np.ndarray) -> str:
    """Compute mixed_sum with Python's integers."""
    mask, total = (1 << 64) - 1, 0
    for i, word in enumerate(words.tolist(), 1):
        x = (word + i * 0x9E3779B97F4A7C15) & mask
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = ((x ^ (x >> 33)) * factor) & mask
        total += x ^ (x >> 33)
    return f"sum-{total & mask:016x}"


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_the_gpus_sum_is_the_formula(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    values = torch.randn(50)
    assert mixed_sum(values) == reference(values.numpy().view(np.int32))
    assert mixed_sum(values.bfloat16()) == reference(values.bfloat16().view(torch.int16).numpy())


@pytest.mark.parametrize("function", [digest, lambda t: mixed_sum(t.contiguous().view(-1))])
def test_one_bit_and_the_order_change_the_digest(function):
    values = torch.randn(64, 33).bfloat16()
    seen = {function(values)}
    for index in range(0, values.numel(), 97):
        for bit in (0, 7, 14):
            changed = values.clone().view(torch.int16).view(-1)
            changed[index] ^= 1 << bit
            seen.add(function(changed.view(torch.bfloat16).view(values.shape)))
    swapped = values.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    seen |= {function(swapped), function(values.flip(0)), function(torch.zeros_like(values))}
    assert len(seen) == 1 + 3 * len(range(0, values.numel(), 97)) + 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype_are_part_of_it(dtype):
    ones = torch.ones(3, 4).to(dtype)
    assert digest(ones) == digest(ones.t().contiguous().t()) == digest(ones.clone())
    assert len({digest(t) for t in (ones, ones.view(4, 3), ones[:2], ones.view(-1))}) == 4
    assert str(dtype).removeprefix("torch.") in digest(ones)


def test_weights_with_a_gradient_have_digests_too():
    weight = torch.nn.Parameter(torch.ones(3))
    assert digest(weight) == digest(torch.ones(3))
