"""SimulatedAcceptance: keeps drafts at random instead of by verification, for tests and benchmarks of speed.

A draft is kept with the same probability a at every depth, given that the drafts before it were kept. A chain of s
drafts then gives 1 + a + ... + a^s tokens a pass on average. a is chosen so that the longest candidate chain gives the
requested length. sglang's own simulation keeps the same number of every sequence, however many were drafted. The best
number of steps would then depend on rounding, and all sequences would be alike.
"""

from __future__ import annotations

import torch

from respec_trainer.rollout.decode_log import DepthSettings


class SimulatedAcceptance:
    """Random acceptance by `settings`, with their seed, so that tensor-parallel ranks draw alike."""

    def __init__(self, settings: DepthSettings):
        self._on = settings.simulated_accept_length is not None
        self.rate = kept_rate(settings.simulated_accept_length or 1.0, settings.most)
        self._generator = torch.Generator().manual_seed(settings.seed)

    def draw(self, accept_index: torch.Tensor, kept: torch.Tensor, predict: torch.Tensor, drafts: torch.Tensor):
        """Replace verification's result, in sglang's format; return the new accept_index [B, s + 1].

        accept_index: global indices of the kept nodes, then -1. kept [B] and predict [B * (s + 1)] are overwritten: the
        drafter's tokens are kept without regard to the target's. drafts [B, s + 1]: the root and its chain.
        """
        batch, width = drafts.shape
        if not self._on or width == 1:
            return accept_index
        uniform = torch.rand(batch, width - 1, generator=self._generator)
        count = (uniform < self.rate).long().cumprod(1).sum(1).to(kept)
        kept.copy_(count)
        predict.copy_(drafts.roll(-1, 1).flatten())
        node = torch.arange(width, device=accept_index.device)
        first = torch.arange(batch, device=accept_index.device)[:, None] * width
        return torch.where(node <= count[:, None], first + node, -1).to(accept_index.dtype)


def kept_rate(length: float, steps: int) -> float:
    """Return a in [0, 1] with 1 + a + ... + a^steps = length, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(steps + 1)) < length:
            low = middle
        else:
            high = middle
    return high if length > 1 else 0.0
