"""REWARDS: the values of `reward.kind`. A new reward is a file next to this one and a line here."""

from __future__ import annotations

from collections.abc import Callable

from respec_trainer.config import RewardConfig
from respec_trainer.registry import Registry
from respec_trainer.rewards import exact, function
from respec_trainer.rewards.contract import Reward

# Each entry makes the reward of a configuration, or raises ConfigError.
REWARDS: Registry[Callable[[RewardConfig], Reward]] = Registry(
    "reward.kind",
    {
        "exact_answer": exact.setup,
        "function": function.setup,
    },
)


def setup_reward(config: RewardConfig) -> Reward:
    """Make the reward that `reward.kind` names. Raises ConfigError if the kind is unknown or cannot be set up."""
    return REWARDS[config.kind](config)


def reward_name(config: RewardConfig) -> str:
    """The name of the reward in errors: the configuration key that chose it, with its value."""
    return f"reward.function={config.function}" if config.function else f"reward.kind={config.kind}"
