"""w(r): the weight of each response in the drafter's loss.

    uniform      1
    reward       r' / mean(r')         r' = r minus the lowest reward, so that none is negative; the paper's w(r) = r,
                                       normalized to a mean of one, so that the scale of rewards does not matter
    advantage    1 + (r - mean) / std  over the prompt's group: the actor moves towards responses of high advantage,
                                       so the drafter learns them ahead of it

Weights are clipped to [FLOOR, CEILING]. Without the floor, failed responses would have no weight if rewards are 0 and
1. They are most of what the engine drafts while the policy is poor, and the drafter would get worse on them. With a
floor of a tenth, rewarded responses still have ten times the weight or more. Without the ceiling, one rare success
among many failures would make up nearly the whole loss.

Whatever the rewards, n responses then keep an effective size, (sum w)^2 / sum w^2, of at least
4 FLOOR CEILING / (FLOOR + CEILING)^2 = 9.5 % of n (the inequality of Polya and Szego). One success of 32 is close to
it: it has more than half of the weight, and the effective size is 3.1. Without the ceiling it would be 1.2.
"""

from __future__ import annotations

from typing import Literal

import torch

Weighting = Literal["uniform", "reward", "advantage"]
FLOOR, CEILING = 0.1, 4.0
# Relative to the largest reward of a pool: a smaller difference is float32's rounding, as in objective/advantages.py.
# Normalizing would make it as large as a real difference.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def response_weights(
    rewards: torch.Tensor, weighting: Weighting, scope: Literal["batch", "group"] = "batch"
) -> tuple[torch.Tensor, bool]:
    """Return weights [prompts, n] in float32 for rewards [prompts, n], and True if they fell back to all ones.

    They do if all rewards are equal up to rounding, or one is infinite. `scope` is the set of responses over which
    "reward" is normalized; a set whose rewards are all equal has weights of one. NaN marks a sample that the reward
    skipped: it does not affect other weights, and its own weight has no meaning. Raises ValueError for an
    unknown `weighting`.
    """
    rewards = rewards.double()
    ones, scored = torch.ones(rewards.shape), ~rewards.isnan()
    if weighting == "uniform":
        return ones, False
    if weighting not in ("reward", "advantage"):
        raise ValueError(f"unknown weighting {weighting!r}")
    known = rewards[scored]
    if _alike(known):
        return ones, True
    weights = torch.ones_like(rewards)
    pools = (1, -1) if weighting == "reward" and scope == "batch" else rewards.shape
    for row, own, known in zip(weights.view(pools), rewards.reshape(pools), scored.view(pools), strict=True):
        row[known] = _relative_weights(own[known], weighting)
    return weights.clamp(FLOOR, CEILING).float(), False


def _relative_weights(rewards: torch.Tensor, weighting: Literal["reward", "advantage"]) -> torch.Tensor:
    """The weights [n] of rewards [n] relative to each other, before clipping; ones if all rewards are alike."""
    if _alike(rewards):
        return torch.ones_like(rewards)
    if weighting == "reward":
        above = rewards - rewards.amin()
        return above / above.mean()
    return 1 + (rewards - rewards.mean()) / rewards.std()


def _alike(rewards: torch.Tensor) -> bool:
    """Return whether rewards [n] are equal up to rounding, or there are none, or one is infinite."""
    largest = rewards.abs().amax() if len(rewards) else 0.0
    return largest in (0.0, torch.inf) or bool(rewards.amax() - rewards.amin() <= ROUNDING * largest)
