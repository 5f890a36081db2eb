"""rollout/fleet/deal.py: expected tokens, and shares of about equal tokens."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import product

import pytest

from respec_trainer.rollout.fleet.deal import Dealer, Unit, begin, deal
from respec_trainer.rollout.sample import Request, Sample, SamplingParams


def requests(*prompts, each=2, most=100):
    params = SamplingParams(max_new_tokens=most)
    return [Request(f"{prompt}:{i}", prompt, params) for prompt in prompts for i in range(each)]


def sample(prompt, length):
    return Sample("", list(prompt), [1] * length, [-1.0] * length, "stop", "a", "d")


def tokens(shares):
    return [sum(unit.tokens for unit in share) for share in shares]


A, B, C = (1,), (2, 2), (3, 3, 3)


def test_expected_lengths_are_of_the_prompt_or_of_all_prompts():
    dealer = Dealer("group")
    assert [u.tokens for u in dealer.units(requests(A, B), 2)] == [2, 4], "prompts only: no response was observed"
    dealer.observe([sample(A, 10), sample(A, 20), sample(B, 60)])
    assert [u.tokens for u in dealer.units(requests(A, B, C), 2)] == [2 * (1 + 15), 2 * (2 + 60), 2 * (3 + 30)]
    dealer.observe([sample(A, 45)])
    assert [u.tokens for u in dealer.units(requests(A, C), 2)] == [2 * (1 + 30), 2 * (3 + 45)]
    assert [u.tokens for u in dealer.units(requests(B, C, most=8), 2)] == [2 * (2 + 8), 2 * (3 + 8)], (
        "at most max_new_tokens"
    )
    again = Dealer("group")
    again.load_state_dict(dealer.state_dict())
    assert again.units(requests(A, B, C), 2) == dealer.units(requests(A, B, C), 2)


def test_prompts_seen_longest_ago_are_dropped(monkeypatch):
    monkeypatch.setattr("respec_trainer.rollout.fleet.deal.MOST", 2)
    dealer = Dealer("group")
    for prompt in (A, B, A, C):
        dealer.observe([sample(prompt, 10)])
    dealer.overall = 1.0
    assert [unit.tokens for unit in dealer.units(requests(A, B, C, each=1), 1)] == [1 + 10, 2 + 1, 3 + 10]


def test_groups_stay_together_or_are_spread():
    assert [u.positions for u in Dealer("group").units(requests(A, B, C), 3)] == [(0, 1), (2, 3), (4, 5)]
    assert [u.positions for u in Dealer("spread").units(requests(A, B), 3)] == [(0,), (1,), (2,), (3,)]
    assert [u.positions for u in Dealer("group").units(requests(A, each=5), 2)] == [(0, 1, 2), (3, 4)], "or one is idle"
    assert Dealer("group").units([], 2) == []


def test_shares_are_at_most_a_third_larger_than_in_the_best_deal():
    draw = random.Random(0)
    for _ in range(50):
        costs = [draw.choice([1, 2, 5, 9, 30]) * draw.random() for _ in range(8)]
        units = [Unit((i,), cost) for i, cost in enumerate(costs)]
        shares = deal(units, 3)
        assert sorted(unit.positions[0] for share in shares for unit in share) == list(range(8))
        assert all(list(share) == sorted(share, key=units.index) for share in shares)
        every = ([sum(c for c, e in zip(costs, way, strict=True) if e == i) for i in range(3)] for way in _ways())
        assert max(tokens(shares)) <= 4 / 3 * min(map(max, every)) + 1e-9


def _ways():
    return product(range(3), repeat=8)


@pytest.mark.parametrize("engines", [1, 2, 4])
def test_equal_units_are_dealt_in_order(engines):
    units = [Unit((i,), 3.0) for i in range(8)]
    each = 8 // engines
    assert deal(units, engines) == [units[i * each : (i + 1) * each] for i in range(engines)]


def test_the_largest_units_begin():
    share = [Unit((0, 1), 4.0), Unit((2, 3), 9.0), Unit((4, 5), 6.0)]
    assert begin(share, 3) == (share[1:], share[:1]), "while there is room"
    assert begin(share, 5) == (share, []) and begin([], 3) == ([], [])
    assert begin(share, 4) == (share[1:], share[:1]) and begin(share, 2) == ([share[1]], [share[0], share[2]])
    assert begin(share, 0) == ([], share)


def test_means_are_saved_by_a_digest_that_later_versions_read():
    dealer = Dealer("group")
    dealer.observe([sample(A, 10)])
    digest = hashlib.blake2b((1).to_bytes(8, "little"), digest_size=8).hexdigest()  # of int64 token ids
    assert json.loads(json.dumps(dealer.state_dict())) == {"means": {digest: 10.0}, "overall": 10.0}
    other = Dealer("group")
    other.load_state_dict(dealer.state_dict())
    other.observe([sample(B, 50)])
    assert dealer.state_dict()["overall"] == 10.0 and len(dealer.means) == 1, "the state was copied"
