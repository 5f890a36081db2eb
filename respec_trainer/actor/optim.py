"""AdamW (arXiv 1711.05101) and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from respec_trainer.config import OptimConfig


def setup_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over `parameters`. Norms and biases, which have one dimension, have no weight decay."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def learning_rate_factor(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor of the learning rate in update `step` of `total`, counted from 0.

    It rises linearly over `warmup_steps` updates, from above 0 in the first one to 1 in the last one. Then it is
    constant, or falls along a line or half a cosine to `min_lr_ratio` in the last update and stays there.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total - 1 - config.warmup_steps, 1), 1.0)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left
