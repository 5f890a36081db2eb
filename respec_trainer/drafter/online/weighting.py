"""w(r): the weight of each response in the drafter's loss.

    uniform      1
    reward       r' / mean(r')         r' = r minus the lowest reward, so that none is negative; the paper's w(r) = r,
                                       normalized to a mean of one, so that the scale of rewards does not matter
    advantage    1 + (r - mean) / std  over the prompt's group: the actor moves towards responses of high advantage,
                                       so the drafter learns them ahead of it

Weights are clipped to [FLOOR, CEILING]. Without the floor, failed responses would have no weight if rewards are 0 and
1. They are most of what the engine drafts while the policy is poor, and the drafter would get worse on them. With a
floor of a tenth, rewarded responses still have ten times the weight. Without the ceiling, one rare success among many
failures would make up nearly the whole loss: at 4, a batch of 32 keeps an effective size of 8 or more.
"""

from __future__ import annotations

from typing import Literal

import torch

Weighting = Literal["uniform", "reward", "advantage"]
FLOOR, CEILING = 0.1, 4.0


def response_weights(
    rewards: torch.Tensor, weighting: Weighting, scope: Literal["batch", "group"] = "batch"
) -> tuple[torch.Tensor, bool]:
    """Return weights [prompts, n] in float32 for rewards [prompts, n], and True if they fell back to all ones.

    They do if all rewards are equal, or one is infinite. `scope` is the set of responses over which "reward" is
    normalized; under "group", a group whose rewards are all equal has weights of one. NaN marks a sample that the
    reward skipped: it does not affect other weights, and its own weight has no meaning. Raises ValueError for an
    unknown `weighting`.
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
        row[known] = _relative_weights(own[known], weighting)
    return weights.clamp(FLOOR, CEILING).float(), False


def _relative_weights(rewards: torch.Tensor, weighting: Literal["reward", "advantage"]) -> torch.Tensor:
    """The weights [n] of rewards [n] relative to each other, before clipping; ones if all rewards are equal."""
    if (rewards == rewards[:1]).all():
        return torch.ones_like(rewards)
    if weighting == "reward":
        above = rewards - rewards.amin()
        return above / above.mean()
    return 1 + (rewards - rewards.mean()) / rewards.std()
