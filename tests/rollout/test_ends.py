"""rollout/ends.py: what a batch gave."""

from __future__ import annotations

from respec_trainer.rollout.ends import Ends


def test_by_default_no_sequence_was_computed_in_vain():
    assert Ends(3.0, 1) == Ends(tokens=3.0, ended=1, over=0)
