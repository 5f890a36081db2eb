"""An estimator of the KL divergence of two distributions, from log-probs of tokens drawn from one of them."""

from __future__ import annotations

import torch


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 of log(p/q) at samples from q: p/q - 1 - log(p/q), never negative; its mean is KL(q || p).

    Source: John Schulman, "Approximating KL Divergence", 2020.
    """
    return log_ratio.expm1() - log_ratio
