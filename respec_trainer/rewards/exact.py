"""Exact match of the final answer, as GSM8K is scored: what follows the last marker, numbers compared by value."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import partial

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.contract import Reward, RewardItem

CURRENCY_AND_UNITS = "$€£%"


def setup(config: RewardConfig) -> Reward:
    """The reward of `reward.kind=exact_answer`."""
    return partial(exact_answers, marker=config.marker)


def exact_answers(items: Sequence[RewardItem], marker: str) -> list[float]:
    return [exact_answer_reward(item.response, item.answer, marker) for item in items]


def exact_answer_reward(response: str, answer: str, marker: str) -> float:
    """1.0 if the response's final answer equals the reference's, else 0.0.

    Args:
        response: what the model wrote. Without a marker it has no answer.
        answer: the reference, a whole solution or only its final answer.
    """
    given = final_answer(response, marker)
    expected = final_answer(answer, marker) if marker in answer else answer
    return float(given is not None and same_answer(given, expected))


def final_answer(text: str, marker: str) -> str | None:
    """The rest of the line after the last marker; None without one."""
    _, found, rest = text.rpartition(marker)
    return rest.strip().partition("\n")[0].strip() if found else None


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers ("1,000" is "$1000.0"), or as text where one of them is no number."""
    left, right = as_number(given), as_number(expected)
    if left is None or right is None:
        return bool(given) and given.strip() == expected.strip()
    return left == right


def as_number(text: str) -> Decimal | None:
    """The number a text states, None if it states anything else; a period at its end is punctuation."""
    digits = text.strip().rstrip(".").strip(CURRENCY_AND_UNITS + " ").replace(",", "")
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
