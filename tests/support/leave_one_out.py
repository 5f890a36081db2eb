"""An objective that the package does not have, the example in docs/extending.md: one file, and a line in the registry.

REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740): the reward of each response is compared with the mean
of the others to its prompt, and nothing is clipped.
"""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.aggregation import token_weights
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import Metrics, Tokens
from respec_trainer.objective.objective import Objective


def leave_one_out(rewards: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Advantages [G, n]: each reward less the mean of the other scored ones; 0 where a sample was skipped."""
    scored = ~rewards.isnan()
    values, others = torch.where(scored, rewards.float(), 0.0), scored.sum(1, keepdim=True) - 1
    baseline = (values.sum(1, keepdim=True) - values) / others.clamp(min=1)
    return torch.where(scored & (others > 0), values - baseline, 0.0)


def reinforce(inputs: LossInputs, config: ObjectiveConfig) -> tuple[torch.Tensor, Metrics]:
    """-sum of weight * A * logprob over tokens, and the mean and largest surprisal of a token."""
    logprobs, tokens = torch.where(inputs.mask, inputs.logprobs, 0.0), Tokens(inputs.mask)
    loss = -(inputs.weights * inputs.advantages[:, None] * logprobs).sum()
    return loss, {"policy/surprisal": tokens.mean(-logprobs), "policy/surprisal_max": tokens.largest(-logprobs)}


LEAVE_ONE_OUT = Objective(advantages=leave_one_out, token_weights=token_weights, loss=reinforce)
