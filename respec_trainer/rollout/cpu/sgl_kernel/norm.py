"""Normalization of query and key heads."""

from __future__ import annotations

import torch.nn.functional as F


def fused_qk_norm_cpu(q, k, q_weight, k_weight, eps: float) -> None:
    """RMS-normalize each head of q [T, H * D] and k [T, Hkv * D] in place. Weights: [D]."""
    for heads, weight in ((q, q_weight), (k, k_weight)):
        heads = heads.view(heads.shape[0], -1, weight.numel())
        heads.copy_(F.rms_norm(heads, weight.shape, weight, eps))
