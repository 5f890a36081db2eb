"""Advantages of responses over the others to the same prompt: baselines without a value model."""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig

# Relative to the largest reward of a group: float32 sums of the same nine numbers of one sign, added in different
# orders, differ by at most this. If the rewards of a group differ by no more, the difference is rounding. Dividing by
# their standard deviation would make it as large as a real difference.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def group_advantages(rewards: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Advantages [G, n] float32 of rewards [G, n], one row a prompt, one column a sample.

    objective.advantage "group_norm" is (r - mean) / std, with the sample standard deviation (GRPO, arXiv 2402.03300,
    section 4.1.2); "group_mean" is r - mean (Dr. GRPO, arXiv 2503.20783). Mean and std are those of the group's scored
    samples.

    Advantages are exactly 0 where a reward is NaN (the sample was skipped), in a group with fewer than two scored
    samples, and in a group whose rewards are equal up to rounding.

    Raises ValueError for rewards of another shape, or n < 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, samples] with at least 2 samples, not {tuple(rewards.shape)}")
    rewards = rewards.float()
    scored = ~rewards.isnan()
    advantages, counts = torch.zeros_like(rewards), scored.sum(1, keepdim=True)
    for count in counts.unique().tolist():  # groups with equally many scored samples make a full matrix
        if count >= 2:
            chosen = scored & (counts == count)
            advantages[chosen] = _full_group_advantages(rewards[chosen].view(-1, count), config.advantage).flatten()
    return advantages


def _full_group_advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    centered = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    largest = rewards.abs().amax(1, keepdim=True)
    alike = (spread <= ROUNDING * largest) & largest.isfinite()
    if kind == "group_norm":
        centered = centered / torch.where(alike, 1.0, rewards.std(1, keepdim=True))
    elif kind != "group_mean":
        raise ValueError(f"unknown kind of advantage {kind!r}")
    return torch.where(alike, 0.0, centered)
