"""A made-up reward for tests, the example in docs/extending.md. Beside this file it needs a line in the registry.

It rewards short right answers: a response is right if it ends with the reference, and a longer one gets a smaller
reward. A response that was cut off is skipped, because the policy did not end it.
"""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.contract import CORRECT, Result, Reward, RewardItem, Score


def setup(config: RewardConfig) -> Reward:
    return reward


def reward(items: Sequence[RewardItem]) -> list[Result]:
    return [None if item.truncated else score(item) for item in items]


def score(item: RewardItem) -> Score:
    correct = float(item.response.endswith(item.answer))
    brief = 1 / (1 + len(item.response_ids) / item.row.get("words", 10))
    return Score(correct * brief, {CORRECT: correct, "brief": brief})
