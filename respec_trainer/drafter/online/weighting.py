"""w(r): how much each response counts in the drafter's loss.

    uniform      1
    reward       r' / mean(r')         r' = r less the lowest reward, so that none is negative; the paper's w(r) = r,
                                       normalized to a mean of one, so that a reward's scale is no learning rate
    advantage    1 + (r - mean) / std  over the prompt's group: the same policy gradient that moves the actor says
                                       where the actor will be

The constants: weights are clipped to [FLOOR, CEILING]. The floor is there because with rewards of 0 and 1 failed
responses would weigh nothing: they are most of what the engine drafts while the policy is poor, and the drafter would
forget how to draft them. A tenth leaves the rewarded ten times their weight. The ceiling is there because one rare
success among many failures would make up the batch alone: at 4, a batch of 32 keeps an effective size of 8 or more.
"""

from __future__ import annotations

from typing import Literal

import torch

Weighting = Literal["uniform", "reward", "advantage"]
FLOOR, CEILING = 0.1, 4.0


def response_weights(
    rewards: torch.Tensor, weighting: Weighting, scope: Literal["batch", "group"] = "batch"
) -> tuple[torch.Tensor, bool]:
    """Weights [prompts, n] in float32 of rewards [prompts, n], and whether they fell back to all ones.

    They do where rewards say nothing: all of them equal, or one not finite. `scope` is what "reward" is normalized
    over; a group whose rewards are all equal then weighs one.
    """
    rewards = rewards.double()
    ones = torch.ones(rewards.shape)
    if weighting == "uniform":
        return ones, False
    if not rewards.isfinite().all() or bool((rewards == rewards.flatten()[:1]).all()):
        return ones, True
    if weighting == "reward":
        whole = rewards if scope == "group" else rewards.reshape(1, -1)
        above = whole - whole.amin(1, keepdim=True)
        weights = _unless_alike(whole, above / above.mean(1, keepdim=True)).view_as(rewards)
    elif weighting == "advantage":
        centered = rewards - rewards.mean(1, keepdim=True)
        weights = _unless_alike(rewards, 1 + centered / rewards.std(1, keepdim=True))
    else:
        raise ValueError(f"unknown weighting {weighting!r}")
    return weights.clamp(FLOOR, CEILING).float(), False


def _unless_alike(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One for rows of rewards that are all equal."""
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 1.0, weights)
