"""Policies that know what no engine knows: the true costs, acceptance and remaining tokens of all running responses.

What a rollout could have taken at best is not known: its end depends on the response that finishes last, and speeding
up that one may slow the others. So regret is measured against the best of several choices made with full knowledge
(`replay.references`), three of which are here. They differ in whose pace counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.policy import FixedPolicy
from respec_trainer.speculation.shape import chain
from respec_trainer.speculation.simulation.trace import conditional

# greedy: the tokens of all responses alike. weighted: each response by the tokens that it still needs, so that what the
# long ones gain counts more. critical: the response alone that will end last.
Kind = Literal["greedy", "weighted", "critical"]


class InformedPolicy(FixedPolicy):
    """The fastest choice for every batch by the true costs and acceptance, with responses weighted by `kind`."""

    def __init__(self, kind: Kind, costs: CostModel, candidates: Sequence[int]):
        self.kind, self.costs, self.candidates = kind, costs, tuple(candidates)
        self.acceptance, self.remaining = np.zeros((1, 1)), np.zeros(1)

    def inform(self, acceptance: np.ndarray, remaining: np.ndarray) -> None:
        """Set the truth: acceptance [B, D] by depth, given that all drafts before it were kept, and tokens left [B]."""
        self.acceptance, self.remaining = acceptance, remaining

    def choose(self, batch: int, context: float, missed: float) -> int:
        taken = np.array([self.costs.cycle_seconds(chain(steps), batch, context) for steps in self.candidates])
        return self.candidates[int((taken * self._passes()).argmin())]

    def _passes(self) -> np.ndarray:
        """Passes that each candidate needs, in proportion: for a token, or for the response that would end last."""
        if self.kind == "critical":
            return (self.remaining[:, None] / self._gains(self.acceptance)).max(0)
        weights = self.remaining if self.kind == "weighted" else None
        return 1 / self._gains(np.array([conditional(self.acceptance, weights)]))[0]

    def _gains(self, acceptance: np.ndarray) -> np.ndarray:
        """Expected tokens a cycle, of acceptance [B, D] with each candidate [B, candidates]."""
        depths = np.minimum(np.arange(max(self.candidates)), acceptance.shape[1] - 1)
        tokens = 1 + acceptance[:, depths].cumprod(1).cumsum(1)
        return np.concatenate([np.ones((len(acceptance), 1)), tokens], 1)[:, self.candidates]
