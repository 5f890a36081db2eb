"""Acceptance: how many of the drafted tokens are kept, by depth, and what that gives a cycle.

`acceptance[d]` is the probability that the draft at depth d + 1 is kept, given that all before it were. Depths beyond
the last are taken to be like the last. Of a tree each entry is a list instead: the probability of each rank among the
drafter's choices, which exclude each other (the positional assumption of Sequoia, Chen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from respec_trainer.speculation.shape import Shape

Acceptance = Sequence[float] | Sequence[Sequence[float]]


def tokens_per_cycle(shape: Shape, acceptance: Acceptance) -> float:
    """Expected tokens a sequence gains by one cycle, the bonus token included.

    Chain: 1 + a1 + a1 a2 + ... Tree: the sum of the probabilities of its nodes' paths, the root's 1 included.
    Raises ValueError if a tree's ranks are not given.
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
    """As EAGLE-2 builds it: each step continues the topk likeliest branches, and the likeliest nodes are verified."""
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
    """Probabilities of topk exclusive choices where only the first's is known: each next has half of what is left."""
    found = [first]
    while len(found) < topk:
        found.append((1 - sum(found)) / 2)
    return found


def depth_acceptance(histogram: Sequence[int]) -> list[float]:
    """Acceptance from counts: histogram[k] passes kept exactly k drafts, all of the same number of draft steps.

    Ends before the first depth that was never reached; empty for an empty histogram.
    """
    survivors = [sum(histogram[depth:]) for depth in range(len(histogram))]
    return [deep / shallow for shallow, deep in zip(survivors, survivors[1:], strict=False) if shallow]


class AcceptanceEstimate:
    """Acceptance by depth as it was lately. Plain Python, for use at every decode step.

    A draft's weight falls by 1 / e with every `memory` drafts at its depth after it, so that a large batch forgets no
    faster by evidence than a small one. Depths that are not tried keep their estimate.

    Args:
        prior: where it starts, by depth, with the weight of `prior_drafts` drafts at each.
    """

    def __init__(self, prior: Sequence[float], memory: float = 300.0, prior_drafts: float = 10.0):
        self.memory = memory
        self.kept = [prior_drafts * a for a in prior]
        self.tried = [prior_drafts] * len(prior)
        self.by_depth = list(prior)

    def age(self, depth: int, drafts: float) -> None:
        """Let what is known of the depths behind the first `depth` count for no more than this many drafts."""
        for d in range(depth, len(self.tried)):
            share = min(1.0, drafts / self.tried[d])
            self.tried[d], self.kept[d] = share * self.tried[d], share * self.kept[d]

    def follow(self, depth: int) -> None:
        """Take the depths behind the first `depth` to be like the last of those."""
        like = self.by_depth[depth - 1]
        for d in range(depth, len(self.tried)):
            self.by_depth[d], self.kept[d] = like, like * self.tried[d]

    def state(self) -> dict[str, list[float]]:
        """For `load_state`; JSON."""
        return {"kept": list(self.kept), "tried": list(self.tried)}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Go on as the estimate whose `state` this was. Depths that it did not have are taken to be like its last."""
        known = min(len(state["tried"]), len(self.tried))
        for d in range(known):
            self.kept[d], self.tried[d] = state["kept"][d], state["tried"][d]
            self.by_depth[d] = self.kept[d] / self.tried[d]
        self.follow(known)

    def observe(self, survivors: Sequence[float]) -> None:
        """survivors[d] = sequences of a verified batch that kept at least d drafts, for d = 0 .. steps."""
        for d in range(min(len(survivors) - 1, len(self.by_depth))):
            tried = survivors[d]
            if not tried:
                return
            decay = math.exp(-tried / self.memory)
            self.tried[d] = decay * self.tried[d] + tried
            self.kept[d] = decay * self.kept[d] + survivors[d + 1]
            self.by_depth[d] = self.kept[d] / self.tried[d]
