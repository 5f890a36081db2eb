"""How much better a response is than the others to the same prompt: baselines without a value model."""

from __future__ import annotations

from typing import Literal

import torch


def group_advantages(rewards: torch.Tensor, kind: Literal["group_norm", "group_mean"]) -> torch.Tensor:
    """Advantages [G, n] of rewards [G, n], one row a prompt, one column a sample.

    "group_norm" is GRPO's (arXiv 2402.03300, section 4.1.2), (r - mean) / std, with the sample standard deviation;
    "group_mean" only subtracts the mean (arXiv 2503.20783). A group whose rewards are all equal has nothing to teach:
    its advantages are 0, exactly.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, samples] with at least 2 samples, not {tuple(rewards.shape)}")
    rewards = rewards.float()
    centered = rewards - rewards.mean(1, keepdim=True)
    # Equal rewards leave rounding in both mean and std, which the division would blow up.
    alike = (rewards == rewards[:, :1]).all(1, keepdim=True)
    if kind == "group_norm":
        centered = centered / torch.where(alike, 1.0, rewards.std(1, keepdim=True))
    elif kind != "group_mean":
        raise ValueError(f"unknown kind of advantage {kind!r}")
    return torch.where(alike, 0.0, centered)
