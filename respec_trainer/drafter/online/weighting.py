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

    They do where rewards say nothing: all of them equal, or one infinite. `scope` is what "reward" is normalized over;
    a group whose rewards are all equal then weighs one. NaN marks a sample that the reward skipped: it takes no part in
    anybody's weight, and its own says nothing.
    """
    rewards = rewards.double()
    ones, scored = torch.ones(rewards.shape), ~rewards.isnan()
    if weighting == "uniform":
        return ones, False
    if weighting not in ("reward", "advantage"):
        raise ValueError(f"unknown weighting {weighting!r}")
    known = rewards[scored]
    if known.isinf().any() or bool((known == known[:1]).all()):
        return ones, True
    weights = torch.ones_like(rewards)
    pools = (1, -1) if weighting == "reward" and scope == "batch" else rewards.shape
    for row, own, known in zip(weights.view(pools), rewards.reshape(pools), scored.view(pools), strict=True):
        row[known] = _standing(own[known], weighting)
    return weights.clamp(FLOOR, CEILING).float(), False


def _standing(rewards: torch.Tensor, weighting: Literal["reward", "advantage"]) -> torch.Tensor:
    """Weights [n] of rewards [n] among each other, before they are clipped; ones where all rewards are equal."""
    if (rewards == rewards[:1]).all():
        return torch.ones_like(rewards)
    if weighting == "reward":
        above = rewards - rewards.amin()
        return above / above.mean()
    return 1 + (rewards - rewards.mean()) / rewards.std()
