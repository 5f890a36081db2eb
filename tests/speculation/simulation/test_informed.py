"""speculation/simulation/informed.py: whose pace counts, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.simulation.informed import InformedPolicy

# A decode step takes 1 s, a cycle of one draft 1.4 s.
COSTS = CostModel({"plain": Terms(fixed=1.0), "draft": Terms(), "verify": Terms(fixed=1.4), "extend": Terms()})


@pytest.mark.parametrize(
    ("acceptance", "remaining", "chosen"),
    [
        # On average 0.5 of the drafts are kept, which pays: 1.5 tokens in 1.4 s.
        ([0.9, 0.1], [50, 50], {"greedy": 1, "weighted": 1, "critical": 0}),
        # The one that needs more tokens keeps 0.3 and counts 3 / 4: 0.45 does pay; for itself 0.3 does not.
        ([0.9, 0.3], [25, 75], {"greedy": 1, "weighted": 1, "critical": 0}),
        # It keeps 0.2: weighted 0.35 does not pay any more.
        ([0.8, 0.2], [25, 75], {"greedy": 1, "weighted": 0, "critical": 0}),
        # The other way round: 0.35 on average does not pay, but the long one keeps 0.6.
        ([0.1, 0.6], [25, 75], {"greedy": 0, "weighted": 1, "critical": 1}),
        # Drafting, the first ends last: 44 cycles of 1.4 s are 61 s; without, the second after 60 steps of 1 s.
        ([0.0, 0.9], [44, 60], {"greedy": 1, "weighted": 1, "critical": 0}),
        ([0.0, 0.9], [42, 60], {"greedy": 1, "weighted": 1, "critical": 1}),
    ],
)
def test_whose_pace_counts(acceptance, remaining, chosen):
    found = {}
    for kind in chosen:
        policy = InformedPolicy(kind, COSTS, [0, 1])
        policy.inform(np.array(acceptance)[:, None], np.array(remaining, dtype=float))
        found[kind] = policy.choose(2, 100.0, 0.0)
    assert found == chosen
