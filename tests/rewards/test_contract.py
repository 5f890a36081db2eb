"""rewards/contract.py: valid results, and errors that name the reward, the sample and the value."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from respec_trainer.errors import RewardError
from respec_trainer.rewards.contract import Score, score_batch
from tests.support.rewards import item


def scored(*results):
    """The checked results of a reward that returns `results`, one for each item."""
    return score_batch("reward.kind=mine", lambda items: list(results), [item(f"r{i}") for i in range(len(results))])


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (True, 1.0),
        (3, 3.0),
        (-0.5, -0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(-2), -2.0),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (torch.tensor(2), 2.0),
        (torch.tensor(0.75, dtype=torch.bfloat16, requires_grad=True), 0.75),
    ],
)
def test_numbers_of_every_make_become_floats(given, value):
    results = scored(given, Score(given, {"part": given}))
    assert results == [Score(value), Score(value, {"part": value})]
    assert {type(number) for score in results for number in (score.value, *score.parts.values())} == {float}


def test_none_skips_a_sample():
    assert scored(1.0, None, 0.0) == [Score(1.0), None, Score(0.0)]


@pytest.mark.parametrize("values", [(1.0, 0.0), np.array([1.0, 0.0]), torch.tensor([1, 0]), iter([1, 0])])
def test_results_come_in_any_sequence(values):
    assert score_batch("r", lambda items: values, [item(), item()]) == [Score(1.0), Score(0.0)]


@pytest.mark.parametrize(
    "wrong",
    [
        float("nan"),
        float("inf"),
        np.float64("-inf"),
        torch.tensor(torch.nan),
        1e39,  # infinite in float32, the dtype of advantages
        10**400,
        "1.0",
        {"score": 1.0},
        [1.0],
        np.array([1.0]),
        1j,
        Decimal(1),
        Score(None),
        Score(1.0, None),
        Score(1.0, {"format": float("nan")}),
        Score(1.0, {"format": "good"}),
        Score(1.0, {"": 1.0}),
        Score(1.0, {7: 1.0}),
    ],
)
def test_anything_else_is_named_with_its_sample_and_the_remedy(wrong):
    with pytest.raises(RewardError) as caught:
        scored(1.0, wrong, 0.0)
    for word in ("reward.kind=mine returned", "prompt 'How many?'", "response 'r1'", "answer '7'", "or None to skip"):
        assert word in str(caught.value)
    shown = str(wrong.value if isinstance(wrong, Score) else wrong)[:20]
    assert shown in str(caught.value)


def test_a_part_that_is_no_number_is_named():
    with pytest.raises(RewardError, match="of which part 'format' is not a named finite number, for prompt"):
        scored(Score(1.0, {"right": 1.0, "format": None}))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], "returned 1 results for a batch of 2 items"),
        ([], "returned 0 results for a batch of 2 items"),
        ([1.0, 0.0, 1.0], "returned 3 results for a batch of 2 items"),
        (None, "returned None for a batch of 2"),
        ("10", "returned '10' for a batch"),
        ({0: 1.0, 1: 0.0}, "returned {0: 1.0, 1: 0.0} for a batch"),
        (1.0, "returned 1.0 for a batch"),
        (torch.tensor(1.0), "TypeError: iteration over a 0-d tensor"),
    ],
)
def test_a_batch_has_one_result_an_item(answer, words):
    with pytest.raises(RewardError, match=words):
        score_batch("r", lambda items: answer, [item(), item()])


@pytest.mark.parametrize("raised", [KeyError("x"), SystemExit(3), RuntimeError()])
def test_a_reward_that_raises_is_named_with_its_line_and_the_batch(raised):
    def reward(items):
        raise raised

    words = rf"r failed on a batch of 2 items .*response 'first'.*{type(raised).__name__}.*test_contract.py, line \d+"
    with pytest.raises(RewardError, match=words) as caught:
        score_batch("r", reward, [item("first"), item("second")])
    assert caught.value.__cause__ is raised


def test_a_long_text_is_cut_in_errors():
    with pytest.raises(RewardError) as caught:
        score_batch("r", lambda items: ["no"], [item("x" * 100_000, prompt="y" * 100_000)])
    assert len(str(caught.value)) < 700 and "xxx..." in str(caught.value)
