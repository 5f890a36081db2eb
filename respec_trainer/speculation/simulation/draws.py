"""Draw which drafts a simulated target keeps."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Drawing(Protocol):
    sampled: bool
    seed: int


def survivals(
    acceptance: np.ndarray, steps: int, responses: np.ndarray, done: np.ndarray, drawing: Drawing
) -> np.ndarray:
    """Return for each draft if it is kept with all before it: 0 or 1 if sampled, or else the probability. [B, steps].

    The random number of a draft depends on the seed, the response and the token's position in it, and on nothing else:
    a token that is hard to guess is so under every policy, and policies are compared in pairs.

    Args:
        acceptance: [B, D] by depth; deeper drafts use the last.
        responses: [B] indices of the responses.
        done: [B] tokens of each response so far.
    """
    by_depth = acceptance[:, np.minimum(np.arange(steps), acceptance.shape[1] - 1)]
    if drawing.sampled:
        positions = done.astype(np.uint64)[:, None] + np.arange(steps, dtype=np.uint64)
        by_depth = uniform(drawing.seed, responses.astype(np.uint64)[:, None], positions) < by_depth
    return by_depth.cumprod(1, dtype=float)


def uniform(seed: int, response: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Hash the arguments to numbers in [0, 1) with the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(np.uint64(seed & (2**64 - 1)) + (response + np.uint64(1)) * golden)
    return (_mix(mixed + (position + np.uint64(1)) * golden) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
