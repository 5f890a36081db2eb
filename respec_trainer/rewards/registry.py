"""The rewards that `reward.kind` chooses among: a new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable

from respec_trainer.config import RewardConfig
from respec_trainer.registry import Registry
from respec_trainer.rewards import exact, function
from respec_trainer.rewards.contract import Reward

# Each entry makes the reward of a configuration, and raises ConfigError where it cannot.
REWARDS: Registry[Callable[[RewardConfig], Reward]] = Registry(
    "reward.kind",
    {
        "exact_answer": exact.setup,
        "function": function.setup,
    },
)


def setup_reward(config: RewardConfig) -> Reward:
    """The reward that `reward.kind` names. Raises ConfigError for an unknown kind, or one that cannot be set up."""
    return REWARDS[config.kind](config)


def reward_name(config: RewardConfig) -> str:
    """The name of the reward in errors: the key that chose it, with its value."""
    return f"reward.function={config.function}" if config.function else f"reward.kind={config.kind}"
