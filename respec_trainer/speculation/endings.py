"""Endings: how much of what a cycle gains lies behind the end of a response, which does not keep it.

A cycle of s drafts gains K tokens, 1 to s + 1. A response ends at a token that does not know of cycles, so it falls
into a cycle with a probability in proportion to K, and at each of its tokens alike. Behind it lie, on average,

    o(s) = E[K (K - 1)] / (2 E[K]) = (1 S_1 + 2 S_2 + ... + s S_s) / (1 + S_1 + ... + S_s)

tokens, where S_d is the probability that d drafts or more are kept: the mean excess of a renewal process. With h ends
a kept token, a running sequence keeps E[K] / (1 + h c o(s)) tokens a cycle. The factor c is what was measured over what
the formula gave: drafts behind a stop token are kept as often as the models happen to agree there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from respec_trainer.rollout.ends import Ends

PRIOR = 1.0  # weight of c = 1, in tokens behind ends


class Endings:
    """Running estimates of h and c, and of the share of computed sequences that were over. Plain Python.

    Args:
        memory: responses; the weight of what was seen falls by a factor e with as many ends.
    """

    def __init__(self, memory: float = 300.0):
        self.memory = memory
        self.kept = self.ended = self.over = self.beyond = self.expected = 0.0

    def observe(self, verified: float, ends: Ends, expected: float) -> None:
        """Add a batch: the tokens that were `verified` for running responses, and o(s) `expected` of each end."""
        decay = math.exp(-ends.ended / self.memory)
        self.kept = decay * self.kept + ends.tokens
        self.ended = decay * self.ended + ends.ended
        self.over = decay * self.over + ends.over
        self.beyond = decay * self.beyond + verified - ends.tokens
        self.expected = decay * self.expected + ends.ended * expected

    def kept_by_steps(self, candidates: Sequence[int], acceptance: Sequence[float]) -> list[float]:
        """Return the tokens that a response keeps of a cycle, a sequence of the batch, with each number of draft steps.

        `candidates` rise; depths beyond the last of `acceptance` are like it.
        """
        rate = self.ended / self.kept if self.ended else 0.0  # ends a kept token
        excess = rate * (self.beyond + PRIOR) / (self.expected + PRIOR)
        # Each end is followed by over / ended sequences that are computed for nothing.
        idle = self.over / self.kept if self.ended else 0.0
        tokens, survival, behind, depth, last = 1.0, 1.0, 0.0, 0, len(acceptance) - 1
        found = []
        for steps in candidates:
            while depth < steps:
                survival *= acceptance[depth if depth < last else last]
                depth += 1
                tokens += survival
                behind += depth * survival
            kept = tokens / (1 + excess * behind / tokens)
            found.append(kept / (1 + kept * idle))
        return found

    def state(self) -> dict[str, float]:
        """Return the state for `load_state`, as JSON data."""
        return {name: getattr(self, name) for name in ("kept", "ended", "over", "beyond", "expected")}

    def load_state(self, state: dict[str, float]) -> None:
        """Restore a `state`."""
        for name, value in state.items():
            setattr(self, name, value)


def tokens_beyond(steps: int, acceptance: Sequence[float]) -> float:
    """Return o(s), the mean tokens that a cycle of `steps` drafts verifies behind an end."""
    tokens, survival, behind, last = 1.0, 1.0, 0.0, len(acceptance) - 1
    for depth in range(steps):
        survival *= acceptance[min(depth, last)]
        tokens += survival
        behind += (depth + 1) * survival
    return behind / tokens
