"""audit/ends.py: faults in the ends of responses."""

from __future__ import annotations

import pytest

from respec_trainer.audit.ends import Ends, check_switched
from respec_trainer.rollout.sample import Sample, SamplingParams


def test_switching_is_seen():
    def sample(*origins):
        return Sample("k", [1], [5] * len(origins), [0.0] * len(origins), "length", "a", "d", origins=list(origins))

    never = sample(0, 1, 2, 1, 2), sample(0, 0, 0), sample(0, 0, 1, 2)
    assert "never" in check_switched(never).pop()
    assert check_switched([*never, sample(0, 1, 2, 0, 2)]) == set()


class Letters:
    def decode(self, tokens):
        return "".join("abcdefgh"[t] for t in tokens)


@pytest.mark.parametrize(
    ("tokens", "reason", "fault"),
    [
        ([1, 2, 3, 4], "length", None),
        ([1, 0], "stop", None),
        ([1, 5], "stop", None),
        ([3, 1, 2], "stop", "without a reason"),
        ([1, 2, 6], "stop", None),
        ([1, 2, 6, 3], "length", "went on"),
        ([1, 0, 3, 4], "length", "went on"),
        ([1, 2], "length", "cut off"),
        ([1, 2, 3, 4, 1], "length", "longer"),
    ],
)
def test_ends(tokens, reason, fault):
    params = SamplingParams(4, stop=("cg",), stop_token_ids=(5,))
    sample = Sample("k", [1], tokens, [0.0] * len(tokens), reason, "a", "d")
    found = Ends(frozenset([0]), Letters()).fault(sample, params)
    assert (found is None) if fault is None else (fault in found)


def test_faults_of_all_responses_are_collected():
    params = [SamplingParams(4)] * 3
    samples = [Sample("k", [1], tokens, [0.0] * len(tokens), "length", "a", "d") for tokens in ([1], [1] * 5, [1] * 4)]
    found = Ends(frozenset([0])).check(samples, params)
    assert sorted(fault.split()[0] for fault in found) == ["cut", "longer"]
