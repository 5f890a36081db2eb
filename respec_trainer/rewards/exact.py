"""Exact match of the final answer, as GSM8K is scored: the text after the last marker; numbers compare by value."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import partial

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.contract import Reward, RewardItem

CURRENCY_AND_UNITS = "$€£%"


def setup(config: RewardConfig) -> Reward:
    """Make the reward of `reward.kind=exact_answer`."""
    return partial(exact_answers, marker=config.marker)


def exact_answers(items: Sequence[RewardItem], marker: str) -> list[float]:
    return [exact_answer_reward(item.response, item.answer, marker) for item in items]


def exact_answer_reward(response: str, answer: str, marker: str) -> float:
    """Return 1.0 if the response's final answer equals the reference's, else 0.0.

    Args:
        response: the text that the model wrote. Without a marker it has no answer.
        answer: the reference, a whole solution or only its final answer.
    """
    given = final_answer(response, marker)
    expected = final_answer(answer, marker) if marker in answer else answer
    return float(given is not None and same_answer(given, expected))


def final_answer(text: str, marker: str) -> str | None:
    """Return the rest of the line after the last marker; None without a marker."""
    _, found, rest = text.rpartition(marker)
    return rest.strip().partition("\n")[0].strip() if found else None


def same_answer(given: str, expected: str) -> bool:
    """Compare as numbers ("1,000" equals "$1000.0"), or as text if one of them is not a number."""
    left, right = as_number(given), as_number(expected)
    if left is None or right is None:
        return bool(given) and given.strip() == expected.strip()
    return left == right


def as_number(text: str) -> Decimal | None:
    """Parse a text as a number; None if it is anything else. A period at the end is punctuation."""
    digits = text.strip().rstrip(".").strip(CURRENCY_AND_UNITS + " ").replace(",", "")
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
