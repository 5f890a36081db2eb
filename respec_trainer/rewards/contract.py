"""The contract of rewards: their input, their results, and the check of the results.

A reward is a callable of a batch of items that returns one result an item, in the same order: a finite number, a Score
with named parts, or None to skip the sample. A skipped sample is left out of its group and not trained on.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from respec_trainer.errors import RewardError

CORRECT = "correct"  # the part for reward/solve_rate: positive if the response is right
LARGEST = float(np.finfo(np.float32).max)  # rewards become float32
SHOWN = 120  # characters of a text in an error


@dataclass(frozen=True)
class RewardItem:
    """One response to be scored. A reward must not change `row`, which all items of a prompt share."""

    prompt: str  # the text that the model read, the template included
    response: str  # without special tokens
    response_ids: tuple[int, ...]  # with special tokens
    truncated: bool  # cut off by rollout.sampling.max_new_tokens
    answer: str  # the reference, from the answer column
    row: Mapping[str, Any] = field(default_factory=dict)  # the data row's other columns


@dataclass(frozen=True)
class Score:
    """A reward with named parts. Only `value` is trained on; the parts' means are metrics, reward/parts/NAME."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


Result = float | Score | None
Reward = Callable[[Sequence[RewardItem]], Sequence[Result]]


def score_batch(name: str, reward: Reward, items: Sequence[RewardItem]) -> list[Score | None]:
    """Call `reward` and check its results, one an item; `name` is the reward's name in errors.

    Raises RewardError, with the item if it is known, if the reward fails or returns anything else than results.
    """
    try:
        results = reward(tuple(items))
        listed = list(results) if isinstance(results, Iterable) and not isinstance(results, str | Mapping) else None
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        what = f"a batch of {len(items)} items that begins with {describe(items[0])}"
        raise failure(name, what, error) from error
    if listed is None or len(listed) != len(items):
        given = shorten(results) if listed is None else f"{len(listed)} results"
        raise RewardError(
            f"{name} returned {given} for a batch of {len(items)} items: return one result an item, in their order"
        )
    return [_checked(name, item, result) for item, result in zip(items, listed, strict=True)]


def _checked(name: str, item: RewardItem, result: Any) -> Score | None:
    if result is None:
        return None
    score = result if isinstance(result, Score) else Score(result)
    value = _finite(score.value)
    parts = score.parts.items() if isinstance(score.parts, Mapping) else [("parts", None)]
    found = {part: _finite(number) for part, number in parts}
    wrong = [part for part, number in found.items() if number is None or not isinstance(part, str) or not part]
    if value is None or wrong:
        part = f", of which part {wrong[0]!r} is not a named finite number," if value is not None else ""
        raise RewardError(
            f"{name} returned {shorten(result)}{part} for {describe(item)}: return a finite number within float32, a "
            "Score(value, parts) of such numbers, or None to skip the sample"
        )
    return Score(value, found)


def _finite(value: Any) -> float | None:
    """Return the number as a Python float; None if `value` is not a number, or not finite in float32."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def failure(name: str, what: str, error: BaseException) -> RewardError:
    """Make the error of a reward that raised `error` on `what`, with the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return RewardError(
        f"{name} failed on {what}: {cause} ({frame.filename}, line {frame.lineno}); a policy can write any text, so "
        "return a number for it, or None to skip the sample"
    )


def describe(item: RewardItem) -> str:
    """Return the beginnings of the item's texts, for an error."""
    return f"prompt {shorten(item.prompt)}, response {shorten(item.response)}, answer {shorten(item.answer)}"


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
