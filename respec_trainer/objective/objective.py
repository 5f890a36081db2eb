"""Objective: three pure functions of tensors and the `objective` section, chosen by `objective.kind`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import Metrics


@dataclass(frozen=True)
class Objective:
    """The three functions of one objective. `dataclasses.replace(GRPO, loss=...)` changes one of another objective."""

    # (rewards [G, n] float, config) -> advantages [G, n] float32. One row a prompt, on the CPU, the same on every rank;
    # NaN where a sample was skipped, whose advantage must be 0.
    advantages: Callable[[torch.Tensor, ObjectiveConfig], torch.Tensor]
    # (mask [B, S] bool, tokens, sequences, config) -> weights [B, S]; see `aggregation.token_weights`.
    token_weights: Callable[[torch.Tensor, float, float, ObjectiveConfig], torch.Tensor]
    # (inputs, config) -> the loss of a micro-batch, a scalar, and its metrics. The loss of a minibatch is the sum over
    # its micro-batches and data-parallel ranks. The metrics' names must not depend on the inputs' values.
    loss: Callable[[LossInputs, ObjectiveConfig], tuple[torch.Tensor, Metrics]]
