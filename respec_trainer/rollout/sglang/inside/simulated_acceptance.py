"""SimulatedAcceptance: keeps drafts by a draw instead of by verification, for tests and benchmarks of speed.

A draft is kept with one probability a at every depth, given that those before it were: a chain of s drafts then gives
1 + a + ... + a^s tokens a pass on average. a is such that the longest candidate chain gives the length asked for.
sglang's own simulation keeps exactly that many of every sequence, however few or many were drafted; what is best then
hangs on the rounding, and no sequence differs from another.
"""

from __future__ import annotations

import torch

from respec_trainer.rollout.decode_log import DepthSettings


class SimulatedAcceptance:
    """By `settings`, from a seed: tensor-parallel ranks draw alike."""

    def __init__(self, settings: DepthSettings):
        self._on = settings.simulated_accept_length is not None
        self.rate = kept_rate(settings.simulated_accept_length or 1.0, settings.most)
        self._generator = torch.Generator().manual_seed(settings.seed)

    def draw(self, accept_index: torch.Tensor, kept: torch.Tensor, predict: torch.Tensor, drafts: torch.Tensor):
        """Replace what verification found, in sglang's terms; returns the new accept_index [B, s + 1].

        accept_index: global nodes of what is kept, -1 behind. kept [B] and predict [B * (s + 1)] are overwritten: the
        tokens become the drafter's own, whatever the target thinks of them. drafts [B, s + 1]: the root and its chain.
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
    """The a in [0, 1] of 1 + a + ... + a^steps = length, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(steps + 1)) < length:
            low = middle
        else:
            high = middle
    return high if length > 1 else 0.0
