"""objective/metrics.py: the value of each kind of metric, combined over micro-batches, minibatches and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.objective.metrics import PerUpdate, Tokens, finish, merge, pack, unpack

VALUES = np.random.default_rng(0).normal(size=(6, 5))
MASK = np.arange(5) < np.array([5, 2, 0, 1, 3, 4])[:, None]


def metrics_of(rows: slice, loss: float = 1.0) -> dict:
    values, tokens = torch.from_numpy(VALUES[rows]), Tokens(torch.from_numpy(MASK[rows]))
    return {
        "mean": tokens.mean(values),
        "share": tokens.mean(values > 0.5),
        "largest": tokens.largest(values),
        "smallest": tokens.smallest(values),
        "loss": PerUpdate.of(torch.tensor(loss, requires_grad=True)),
    }


def test_metrics_of_parts_are_those_of_the_whole():
    parts = [metrics_of(slice(0, 2), 0.25), metrics_of(slice(2, 3), 0.5), metrics_of(slice(3, 6), 4.0)]
    inside = VALUES[MASK]
    numbers = finish(merge([merge(parts[:2]), parts[2]]), updates=2)
    expected = {"mean": inside.mean(), "share": (inside > 0.5).mean(), "largest": inside.max()}
    expected |= {"smallest": inside.min(), "loss": 4.75 / 2}
    assert numbers == pytest.approx(expected)


def test_ranks_are_combined_by_a_sum_and_a_maximum_of_what_was_packed():
    ranks = [metrics_of(slice(0, 2)), metrics_of(slice(2, 6))]
    packed = [pack(metrics) for metrics in ranks]
    added = packed[0][0] + packed[1][0]
    compared = torch.maximum(packed[0][1], packed[1][1])
    together = metrics_of(slice(0, 6), loss=2.0)
    for metrics in ranks:
        assert finish(unpack(metrics, added, compared)) == pytest.approx(finish(together))


def test_without_tokens_a_mean_is_zero_and_an_extreme_is_left_out():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    values, tokens, optional = torch.ones(2, 3), Tokens(nothing), Tokens(nothing, empty=None)
    metrics = {"mean": tokens.mean(values), "largest": tokens.largest(values), "smallest": tokens.smallest(values)}
    assert finish(metrics | {"optional": optional.mean(values)}) == {"mean": 0.0}


def test_what_one_part_lacks_another_may_have():
    mask = torch.tensor([[True, False]])
    parts = [{"mean": Tokens(m, empty=None).mean(torch.tensor([[3.0, 9.0]]))} for m in (mask, mask & False)]
    assert finish(merge(parts)) == {"mean": 3.0}


def test_values_outside_the_mask_are_not_looked_at_and_those_inside_are_not_hidden():
    values, mask = torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]])
    for tokens, expected in ((Tokens(mask), 1.0), (Tokens(~mask), float("nan"))):
        numbers = finish({"m": tokens.mean(values), "l": tokens.largest(values), "s": tokens.smallest(values)})
        assert numbers == pytest.approx(dict.fromkeys("mls", expected), nan_ok=True)


def test_an_extreme_on_the_far_side_of_zero_is_found():
    values, mask = torch.tensor([[-3.0, -2.0, 5.0]]), torch.tensor([[True, True, False]])
    assert finish({"l": Tokens(mask).largest(values), "s": Tokens(mask).smallest(-values)}) == {"l": -2.0, "s": 2.0}


def test_long_sums_are_kept_in_double_precision():
    ones = Tokens(torch.ones(1, 1, dtype=torch.bool))
    parts = [{"mean": ones.mean(torch.tensor([[value]]))} for value in (2.0**24, 1.0, 1.0)]
    assert finish(merge(parts)) == {"mean": (2**24 + 2) / 3}


def test_one_part_is_merged_to_itself_and_one_update_is_the_default():
    part = metrics_of(slice(0, 6), loss=3.0)
    assert finish(merge([part])) == finish(part)
    assert finish(part)["loss"] == 3.0 and finish(part, updates=4)["loss"] == 0.75


def test_metrics_keep_no_graph():
    """Otherwise a step's activations would live until its metrics are copied."""
    value = torch.ones(1, 2, requires_grad=True)
    tokens = Tokens(torch.ones(1, 2, dtype=torch.bool))
    parts = [tokens.mean(value).total, tokens.largest(value).signed, tokens.smallest(value).signed]
    assert not any(part.requires_grad for part in [*parts, PerUpdate.of(value.sum()).total])


def test_metrics_of_some_micro_batches_only_are_refused_by_name():
    with pytest.raises(ValueError, match="gave share for some micro-batches only"):
        part = metrics_of(slice(0, 2))
        merge([part, {name: metric for name, metric in part.items() if name != "share"}])
