"""Which drafts a simulated target keeps."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Drawing(Protocol):
    sampled: bool
    seed: int


def survivals(
    acceptance: np.ndarray, steps: int, responses: np.ndarray, done: np.ndarray, drawing: Drawing
) -> np.ndarray:
    """Whether each draft of a cycle is kept, with all before it: 0 or 1 if sampled, else the probability. [B, steps].

    Whether a draft is kept depends on the seed, the response and the token's place in it, and not on what happened
    before: a token that is hard to guess is so under every policy, and policies are compared in pairs.

    Args:
        acceptance: [B, D] of each depth; deeper ones are like the last.
        responses: [B] which ones they are.
        done: [B] tokens of each so far.
    """
    by_depth = acceptance[:, np.minimum(np.arange(steps), acceptance.shape[1] - 1)]
    if drawing.sampled:
        places = done.astype(np.uint64)[:, None] + np.arange(steps, dtype=np.uint64)
        by_depth = uniform(drawing.seed, responses.astype(np.uint64)[:, None], places) < by_depth
    return by_depth.cumprod(1, dtype=float)


def uniform(seed: int, response: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) by counter: the finalizer of SplitMix64 (Steele, Lea and Flood 2014) over the arguments."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(np.uint64(seed & (2**64 - 1)) + (response + np.uint64(1)) * golden)
    return (_mix(mixed + (place + np.uint64(1)) * golden) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
