"""Acceptance: the share of drafted tokens that are kept, by depth, and the tokens that a cycle gains from it.

`acceptance[d]` is the probability that the draft at depth d + 1 is kept, given that all drafts before it were kept.
Depths beyond the last entry use the last entry. For a tree each entry is a list: the probability of each rank among
the drafter's choices, which exclude each other (the positional assumption of Sequoia, Chen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from respec_trainer.speculation.shape import Shape

Acceptance = Sequence[float] | Sequence[Sequence[float]]


def tokens_per_cycle(shape: Shape, acceptance: Acceptance) -> float:
    """Return the expected tokens that a sequence gains in one cycle, including the bonus token.

    Chain: 1 + a1 + a1 a2 + ... Tree: the sum over nodes of the probability of the path to the node; the root counts 1.
    Raises ValueError for a tree if `acceptance` has too few ranks.
    """
    if shape.topk == 1:
        return _chain_tokens(min(shape.steps, shape.draft_tokens - 1), acceptance)
    return _tree_tokens(shape, acceptance)


def _chain_tokens(depth: int, acceptance: Acceptance) -> float:
    tokens = survival = 1.0
    for d in range(depth):
        first = acceptance[min(d, len(acceptance) - 1)]
        survival *= first if isinstance(first, float | int) else first[0]
        tokens += survival
    return tokens


def _tree_tokens(shape: Shape, acceptance: Acceptance) -> float:
    """Expected tokens of an EAGLE-2 tree: each step extends the topk best branches, and the best nodes are verified."""
    steps, topk, draft_tokens = shape
    branches, nodes = [1.0], []
    for d in range(steps):
        ranks = acceptance[min(d, len(acceptance) - 1)]
        if isinstance(ranks, float | int) or len(ranks) < topk:
            raise ValueError(f"shape {shape} has {topk} branches, but depth {d + 1} gives no {topk} ranks: {ranks!r}")
        level = sorted((branch * p for branch in branches for p in ranks[:topk]), reverse=True)
        nodes += level
        branches = level[:topk]
    return 1.0 + sum(sorted(nodes, reverse=True)[: draft_tokens - 1])


def ranks(first: float, topk: int) -> list[float]:
    """Probabilities of topk exclusive choices if only the first is known: each next choice gets half of the rest."""
    found = [first]
    while len(found) < topk:
        found.append((1 - sum(found)) / 2)
    return found


def depth_acceptance(histogram: Sequence[int]) -> list[float]:
    """Compute acceptance from counts: histogram[k] passes kept exactly k drafts.

    All passes must have the same number of draft steps. The result ends before the first depth that was never reached;
    it is empty for an empty histogram.
    """
    survivors = [sum(histogram[depth:]) for depth in range(len(histogram))]
    return [deep / shallow for shallow, deep in zip(survivors, survivors[1:], strict=False) if shallow]


class AcceptanceEstimate:
    """A running estimate of acceptance by depth. Plain Python, for use at every decode step.

    The weight of a draft falls by a factor e with every `memory` later drafts at its depth. So old evidence decays with
    the number of drafts, not of batches. Depths that are not drafted keep their estimate.

    Args:
        prior: the initial acceptance by depth, with the weight of `prior_drafts` drafts at each depth.
    """

    def __init__(self, prior: Sequence[float], memory: float = 300.0, prior_drafts: float = 10.0):
        self.memory = memory
        self.kept = [prior_drafts * a for a in prior]
        self.tried = [prior_drafts] * len(prior)
        self.by_depth = list(prior)

    def age(self, depth: int, drafts: float) -> None:
        """Limit the weight of the estimates beyond the first `depth` depths to this many drafts."""
        for d in range(depth, len(self.tried)):
            share = min(1.0, drafts / self.tried[d])
            self.tried[d], self.kept[d] = share * self.tried[d], share * self.kept[d]

    def follow(self, depth: int) -> None:
        """Set the estimates beyond the first `depth` depths to the estimate of the last of these."""
        like = self.by_depth[depth - 1]
        for d in range(depth, len(self.tried)):
            self.by_depth[d], self.kept[d] = like, like * self.tried[d]

    def state(self) -> dict[str, list[float]]:
        """Return the state for `load_state`, as JSON data."""
        return {"kept": list(self.kept), "tried": list(self.tried)}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Restore a `state`. Depths that the state lacks get the estimate of its last depth."""
        known = min(len(state["tried"]), len(self.tried))
        for d in range(known):
            self.kept[d], self.tried[d] = state["kept"][d], state["tried"][d]
            self.by_depth[d] = self.kept[d] / self.tried[d]
        self.follow(known)

    def observe(self, survivors: Sequence[float]) -> None:
        """Add a verified batch: survivors[d] of its sequences kept at least d drafts, for d = 0 .. steps."""
        for d in range(min(len(survivors) - 1, len(self.by_depth))):
            tried = survivors[d]
            if not tried:
                return
            decay = math.exp(-tried / self.memory)
            self.tried[d] = decay * self.tried[d] + tried
            self.kept[d] = decay * self.kept[d] + survivors[d + 1]
            self.by_depth[d] = self.kept[d] / self.tried[d]
