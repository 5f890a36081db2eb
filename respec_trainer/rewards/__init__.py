"""Scoring responses: text in, a number out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.exact import exact_answer_reward
from respec_trainer.rewards.function import load_function

Reward = Callable[[str, str], float]  # (response text, reference answer) -> reward


def setup_reward(config: RewardConfig) -> Reward:
    """The reward that `reward.kind` names. Raises ConfigError for a function that cannot be loaded."""
    if config.kind == "function":
        return load_function(config.function)
    return partial(exact_answer_reward, marker=config.marker)
