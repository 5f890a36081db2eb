"""rewards/exact.py: equal and different answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.exact import as_number
from respec_trainer.rewards.registry import setup_reward
from tests.support.rewards import item


def reward(response: str, answer: str) -> float:
    (result,) = setup_reward(RewardConfig())([item(response, answer)])
    return result


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "#### 7"),
        ("#### 1,000", "1000"),
        ("#### $18.00", "She makes <<9*2=18>>18 dollars\n#### 18"),
        ("#### 7.", "7"),
        ("#### .5", "0.5"),
        ("####\n7", "7"),  # the answer on the next line
        ("#### -3", "-3"),
        ("#### 5\n#### 6", "6"),  # the last marker counts
        ("#### 7\nand more words", "7"),
        ("#### x + 1", "x + 1"),
        ("####  x + 1 ", " x + 1\t"),
        ("#### 50 %", "50"),
        ("#### 50%", "#### 50 %"),
        ("#### snan", "snan"),  # no numbers: compared as texts
        ("#### -nan", "#### -nan"),
    ],
)
def test_equal_answers(response, answer):
    assert reward(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("the answer is 7", "7"),  # no marker, no answer
        ("#### 8", "7"),
        ("#### 6\n#### 5", "6"),
        ("####", "7"),
        ("#### 7 8", "7"),
        ("#### nan", "7"),
        ("#### 77", "7"),
        ("", "7"),
        ("####", ""),  # an empty text is never a right answer
        ("####", "####"),
        ("#### snan", "7"),
        ("#### 7", "snan"),
        ("#### inf", "Infinity"),
        ("#### -nan", "nan"),
        ("#### 1e400", "inf"),
    ],
)
def test_different_answers(response, answer):
    assert reward(response, answer) == 0.0


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_read_however_it_is_written(number):
    for text in (f"{number:,}", f"{number}.0", f" ${number} ", f"{number}."):
        assert as_number(text) == number
    assert as_number("\t$50.\n") == as_number("50 %") == 50 and as_number("50 apples") is None


def test_a_batch_is_scored_in_order():
    items = [item("#### 7"), item("#### 8"), item("#### 8", "8")]
    assert setup_reward(RewardConfig())(items) == [1.0, 0.0, 1.0]


def test_another_marker_may_be_given_but_not_none():
    (result,) = setup_reward(RewardConfig(marker="answer:"))([item("the answer: 7")])
    assert result == 1.0
    for marker in ("", " "):
        with pytest.raises(ValueError, match="marks nothing: give the text that comes before an answer"):
            RewardConfig(marker=marker)
