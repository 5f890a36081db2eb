"""The distribution that top_k and top_p leave, in NumPy, one token at a time."""

from __future__ import annotations

import numpy as np


def truncate(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Keep the top_k (-1: all) most probable tokens of probs [V], of these the first up to the share top_p."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    order = order[: top_k if top_k > 0 else len(order)]
    limit = top_p * sum(probs[token] for token in order)
    kept, held = np.zeros_like(probs), 0.0
    for token in order:
        if held > limit:
            break
        kept[token] = probs[token]
        held += probs[token]
    return kept / kept.sum()
