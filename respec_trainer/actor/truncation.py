"""Truncation: the tokens that top_k and top_p keep, when each rank has the scores of only part of the vocabulary.

The kept tokens of a distribution are those above a threshold, so no rank has to sort or to gather the vocabulary: the
threshold is found by bisection, which only needs sums over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

FIRST, LAST = -(2**31), 2**31 - 1  # of int32, to which float32 scores are mapped in their order


@dataclass(frozen=True)
class Truncation:
    """top_k keeps the most probable tokens, then top_p the most probable of these.

    top_p keeps a token if the tokens before it hold at most the share top_p of the mass that top_k kept. Of tokens with
    equal scores, all are kept or none. top_k=-1 and top_p=1 keep all.
    """

    top_k: int = -1
    top_p: float = 1.0

    @property
    def keeps_all(self) -> bool:
        return self.top_k <= 0 and self.top_p >= 1

    def kept(self, scores: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Return the mask [n, V / tp] of kept tokens, from scores [n, V / tp] float32: logits up to a constant a row.

        Only the columns of this rank are given and returned; every rank of `group` calls it. Scores must be at most
        about 0, so that their exponentials can be added.
        """
        order = _ordered(scores)
        kept = torch.ones_like(scores, dtype=torch.bool)
        if self.top_k > 0:
            most = scores.new_full(scores.shape[:1], self.top_k - 0.5)
            kept = order >= _threshold(order, None, most, group)[:, None]
        if self.top_p < 1:
            mass = torch.where(kept, scores.exp(), 0.0)
            total = mass.sum(-1)
            dist.all_reduce(total, group=group)
            kept = kept & (order >= _threshold(order, mass, self.top_p * total, group)[:, None])
        return kept


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Map float32 to int32 so that the order is the same: of negative numbers all bits but the sign are inverted."""
    bits = (scores + 0.0).view(torch.int32)  # adding 0 makes -0 the same as 0
    return torch.where(bits < 0, bits ^ LAST, bits)


def _threshold(
    order: torch.Tensor, weights: torch.Tensor | None, most: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the least t [n] for which the entries of `order` [n, V / tp] above t have weights of at most `most` [n].

    Without `weights` each entry counts as 1. There are 32 rounds of bisection over int32; each adds the weights over
    this rank's columns, then over the ranks.
    """
    low = torch.full(order.shape[:1], FIRST, dtype=torch.int64, device=order.device)
    high = torch.full_like(low, LAST)
    for _ in range(32):
        middle = (low + high) >> 1
        larger = order > middle[:, None]
        above = (larger if weights is None else torch.where(larger, weights, 0.0)).sum(-1, dtype=torch.float32)
        dist.all_reduce(above, group=group)
        fits = above <= most
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle + 1)
    return high
