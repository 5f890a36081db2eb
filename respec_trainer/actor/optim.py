"""AdamW (arXiv 1711.05101) and its learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from respec_trainer.config import OptimConfig


def setup_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameters`; norms and biases, the one-dimensional ones, do not decay."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def learning_rate_factor(config: OptimConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied by in update `step` of `total`, counted from 0.

    Rises linearly over `warmup_steps` updates, the first one already above 0 and the last one 1, then stays, or falls
    along a line or half a cosine to `min_lr_ratio` in the last update and stays there.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total - 1 - config.warmup_steps, 1), 1.0)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left
