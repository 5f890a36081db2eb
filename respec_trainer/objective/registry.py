"""OBJECTIVES: the values of `objective.kind`; RunObjective: the chosen objective with a run's settings."""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.grpo import GRPO
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import Metrics
from respec_trainer.objective.objective import Objective
from respec_trainer.registry import Registry

OBJECTIVES: Registry[Objective] = Registry("objective.kind", {"grpo": GRPO})


class RunObjective:
    """A run's objective with its settings, as trainer and actor call it."""

    def __init__(self, objective: Objective, config: ObjectiveConfig):
        self._functions, self._config = objective, config

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages [G, n] float32 of rewards [G, n], NaN where a sample was skipped.

        Raises ValueError unless the objective returns one advantage for each reward.
        """
        advantages = self._functions.advantages(rewards, self._config)
        if advantages.shape != rewards.shape:
            raise ValueError(
                f"objective.kind={self._config.kind} gave advantages {tuple(advantages.shape)} for rewards "
                f"{tuple(rewards.shape)}: give one for each reward"
            )
        return advantages

    def token_weights(self, mask: torch.Tensor, tokens: float, sequences: float) -> torch.Tensor:
        """The weight [B, S] of each token of mask [B, S] in the loss; see `aggregation.token_weights`."""
        return self._functions.token_weights(mask, tokens, sequences, self._config)

    def loss(self, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """The loss of a micro-batch, a scalar with a gradient, and its metrics."""
        return self._functions.loss(inputs, self._config)


def setup_objective(config: ObjectiveConfig) -> RunObjective:
    """The objective that `objective.kind` names. Raises ConfigError, with the nearest name, for an unknown kind."""
    return RunObjective(OBJECTIVES[config.kind], config)
