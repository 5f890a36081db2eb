"""drafter/online/measure.py: sums over micro-batches and ranks, and the metrics made of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from respec_trainer.drafter.loss import DepthSums, distill_loss
from respec_trainer.drafter.online.measure import Measurement, measure
from respec_trainer.drafter.online.recall import recall
from tests.support.drafters import DRAFT_IDS, stored_row, stored_snapshot, tiny_drafter
from tests.support.models import tiny_run_config

CPU = torch.device("cpu")
RESPONSES = (9, 4, 2, 6, 1, 12)
SNAPSHOT = stored_snapshot()
ROWS = [
    dataclasses.replace(stored_row(SNAPSHOT, response=length, seed=i), passes=3 + i, weight=0.1 + i)
    for i, length in enumerate(RESPONSES)
]


def config(**changes):
    keys = {"path": "drafter", "weighting": "reward", "unroll": 4, "micro_batch_size": 4}
    settings = {"speculation.algorithm": "eagle3"} | {f"drafter.{key}": value for key, value in keys.items()}
    return tiny_run_config("actor", settings | changes)


def test_sums_are_those_of_all_rows_in_one_batch_whatever_the_micro_batches():
    drafter = tiny_drafter()
    _, wanted = distill_loss(drafter, *recall(ROWS, 1.0, CPU, DRAFT_IDS), 4)
    for size in (1, 4, 8):
        found = measure(drafter, DRAFT_IDS, ROWS, config(**{"drafter.micro_batch_size": size}), CPU)
        for name, sums in vars(wanted).items():
            torch.testing.assert_close(getattr(found.depths, name).float(), sums, rtol=1e-4, atol=1e-5)
        # The first token of a response came with the prompt, the others with passes.
        assert (found.passes, found.gained) == (sum(range(3, 9)), sum(RESPONSES) - len(RESPONSES))
    assert not any(weight.grad is not None for weight in drafter.parameters())


def test_it_measures_at_the_sampling_temperature():
    """At T: logits of both models are divided by T, which a drafter with a divided output layer shows."""
    other = tiny_drafter()
    with torch.no_grad():
        other.lm_head.weight /= 0.7
    _, wanted = distill_loss(other, *recall(ROWS, 0.7, CPU, DRAFT_IDS), 4)
    found = measure(tiny_drafter(), DRAFT_IDS, ROWS, config(**{"rollout.sampling.temperature": 0.7}), CPU)
    torch.testing.assert_close(found.depths.alpha.float(), wanted.alpha, rtol=1e-4, atol=1e-5)


def test_flat_sums_of_ranks_add_up():
    drafter = tiny_drafter()
    whole, *parts = (measure(drafter, DRAFT_IDS, rows, config(), CPU) for rows in (ROWS, ROWS[:2], ROWS[2:]))
    flat = sum(part.flat() for part in parts)
    torch.testing.assert_close(flat, whole.flat(), rtol=1e-5, atol=1e-6)
    again = Measurement.of_flat(whole.flat())
    assert torch.equal(again.flat(), whole.flat()) and again.passes == whole.passes and again.gained == whole.gained
    assert torch.equal(Measurement.none(4).flat(), measure(drafter, DRAFT_IDS, [], config(), CPU).flat())
    assert not Measurement.none(4).flat().any() and len(Measurement.none(4).flat()) == len(flat)


def measurement(**changes) -> Measurement:
    """Ten tokens drafted at each of three depths; 8, 6 and 5 passes with chains of 1, 2 and 3 drafts for 12 tokens."""
    rows = {
        "loss": [1.0, 2.0, 3.0],
        "weight": [10.0] * 3,
        "alpha": [8.0, 5.0, 2.0],
        "top1": [9.0, 6.0, 3.0],
        "tokens": [10.0] * 3,
        "passes": [8.0, 6.0, 5.0],
        "gained": [12.0] * 3,
    }
    values = {name: torch.tensor(value) for name, value in rows.items()}
    return dataclasses.replace(Measurement(DepthSums(**values), passes=4.0, gained=10.0), **changes)


def test_metrics_by_hand():
    found = measurement().metrics(config(**{"speculation.steps": 2, "speculation.draft_tokens": 3}))
    assert found["drafter/acceptance"] == pytest.approx([0.8, 0.5, 0.2])
    assert found["drafter/top1"] == pytest.approx([0.9, 0.6, 0.3])
    assert found["drafter/predicted_accept_length"] == pytest.approx(12 / 6)
    assert found["drafter/measured_accept_length"] == pytest.approx(2.5)
    assert len(found) == 4


def test_rejection_sampling_is_predicted_from_acceptances_and_a_tree_is_not():
    shape = {"speculation.steps": 2, "speculation.draft_tokens": 3}
    drawn = config(**shape | {"speculation.rejection_sampling": True})
    assert measurement().metrics(drawn)["drafter/predicted_accept_length"] == pytest.approx(1 + 0.8 + 0.8 * 0.5)
    tree = config(**{"speculation.steps": 2, "speculation.topk": 2, "speculation.draft_tokens": 5})
    assert "drafter/predicted_accept_length" not in measurement().metrics(tree)


def test_without_drafts_or_passes_nothing_is_reported():
    assert Measurement.none(3).metrics(config()) == {}
    assert "drafter/measured_accept_length" not in measurement(passes=0.0).metrics(config())
