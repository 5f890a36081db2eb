"""resync/finite.py: a single NaN or infinity anywhere is found, and named; large numbers are no infinities."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.resync.finite import first_non_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_finite(dtype):
    limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    values = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny], dtype=dtype)
    assert first_non_finite([("a", values), ("empty", values[:0]), ("scalar", values[2])]) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_named(dtype, bad):
    for place in (0, 15, 16, 99):
        weights = {name: torch.randn(10, 10).to(dtype) for name in "abc"}
        weights["b"].view(-1)[place] = bad
        assert first_non_finite(weights.items()) == "b"
        assert first_non_finite([("t", weights["b"].t())]) == "t", "not contiguous"


def test_a_negative_nan_is_one():
    negative = torch.tensor([-1], dtype=torch.int16).view(torch.bfloat16)  # every bit set
    assert negative.isnan().all() and first_non_finite([("a", negative)]) == "a"
