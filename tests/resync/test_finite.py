"""resync/finite.py: a single NaN or infinity anywhere is found, and named; large numbers are no infinities."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from respec_trainer.resync.finite import first_non_finite, local_weights

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


def test_the_first_of_several_is_named():
    bad = torch.tensor([float("nan")])
    assert first_non_finite([("a", torch.ones(2)), ("b", bad), ("c", bad)]) == "b"
    assert first_non_finite([]) is None


def test_a_rank_s_weights_are_its_parameters():
    module = torch.nn.Linear(2, 3)
    found = dict(local_weights(module, zero3=False))
    assert list(found) == ["weight", "bias"] and found["weight"] is module.weight


@pytest.mark.parametrize(("rank", "held"), [(0, [0, 1]), (1, [2, 3]), (2, [4]), (3, [])])
def test_padding_of_a_zero_3_part_is_left_out(monkeypatch, rank, held):
    """Four ranks hold two entries each of a parameter with five; what follows the fifth is undefined."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: {"group": rank}[group])
    whole = torch.tensor([0.0, 1, 2, 3, 4, torch.nan, torch.nan, torch.nan])
    parameter = SimpleNamespace(ds_tensor=whole[2 * rank : 2 * rank + 2], ds_numel=5, ds_process_group="group")
    nothing = SimpleNamespace(ds_tensor=torch.zeros(0), ds_numel=0, ds_process_group="group")
    module = SimpleNamespace(named_parameters=lambda: [("a", nothing), ("b", parameter)])
    assert [(name, part.tolist()) for name, part in local_weights(module, zero3=True)] == [("b", held)]
