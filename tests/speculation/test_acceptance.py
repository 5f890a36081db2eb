"""speculation/acceptance.py and draws.py: tokens a cycle gains, from probabilities, counts and draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.speculation.acceptance import AcceptanceEstimate, depth_acceptance, ranks, tokens_per_cycle
from respec_trainer.speculation.shape import OFF, Shape, chain
from respec_trainer.speculation.simulation.draws import survivals, uniform
from respec_trainer.speculation.simulation.simulator import Setting

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@given(probabilities, st.integers(0, 8))
def test_a_chain_gains_the_sum_of_its_survivals(acceptance, steps):
    padded = acceptance + acceptance[-1:] * 8
    expected = 1 + sum(np.prod(padded[:depth]) for depth in range(1, steps + 1))
    assert tokens_per_cycle(chain(steps), acceptance) == pytest.approx(expected)
    assert tokens_per_cycle(OFF, acceptance) == 1.0


@given(st.lists(st.floats(0.01, 0.33), min_size=3, max_size=3), st.integers(1, 12))
def test_a_tree_gains_the_paths_of_its_likeliest_nodes(ranks, verified):
    """Compare with all paths enumerated: two levels of three branches each, all of which are continued."""
    paths = ranks + [a * b for a, b in itertools.product(ranks, ranks)]
    expected = 1 + sum(sorted(paths)[-verified:])
    assert tokens_per_cycle(Shape(2, 3, verified + 1), [ranks, ranks]) == pytest.approx(expected)


@given(st.lists(st.lists(st.floats(0.01, 0.24), min_size=4, max_size=4), min_size=5, max_size=5))
def test_more_branches_never_gain_less(ranks):
    ranks = [sorted(level, reverse=True) for level in ranks]
    gains = [tokens_per_cycle(Shape(5, topk, 6), ranks) for topk in (1, 2, 4)]
    assert gains == sorted(gains)


def test_a_tree_needs_ranks():
    with pytest.raises(ValueError, match="2 branches, but depth 1 gives no 2 ranks"):
        tokens_per_cycle(Shape(3, 2, 4), [0.5])


def test_histograms():
    assert depth_acceptance([2, 3, 5]) == pytest.approx([8 / 10, 5 / 8])
    assert depth_acceptance([4, 0, 0]) == [0.0]  # nothing was tried at depth 2
    assert depth_acceptance([]) == depth_acceptance([0, 0]) == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.2, 0.95), min_size=3, max_size=3), st.integers(0, 2**31))
def test_draws_have_their_probabilities(acceptance, seed):
    draws = 40_000
    kept = survivals(np.array([acceptance] * draws), 4, np.arange(draws), np.zeros(draws), Setting(seed=seed))
    found = depth_acceptance(np.bincount(kept.sum(1).astype(int), minlength=5))
    tried = np.array([draws, *kept.sum(0)[:3]])
    truth = np.array([*acceptance, acceptance[-1]])
    # Six standard deviations of a binomial share.
    assert (np.abs(found - truth) < 6 * np.sqrt(truth * (1 - truth) / tried)).all()


def test_a_token_is_as_predictable_under_every_policy():
    """A draft at one position gets the same random number from every cycle; other responses get other numbers."""
    acceptance, compared = np.full((1, 1), 0.5), set()
    for position in range(50):
        (whole,) = survivals(acceptance, 4, np.array([7]), np.array([position]), Setting())
        (later,) = survivals(acceptance, 3, np.array([7]), np.array([position + 1]), Setting())
        assert not whole[0] or (whole[1:] == later).all()
        compared.add(tuple(later) if whole[0] else ())
    assert compared == {(), (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)}, "positions differ"
    numbers = uniform(0, np.arange(100, dtype=np.uint64)[:, None], np.arange(100, dtype=np.uint64))
    assert len(np.unique(numbers)) == 10_000
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.05  # five standard deviations


def test_expected_drafts():
    drawing = Setting(sampled=False)
    kept = survivals(np.array([[0.5, 0.4]]), 3, np.array([0]), np.array([0]), drawing)
    assert kept.tolist() == [pytest.approx([0.5, 0.2, 0.08])]
    assert survivals(np.array([[0.5]]), 0, np.array([0]), np.array([0]), drawing).shape == (1, 0)


def test_the_estimate_follows_what_it_sees():
    estimate = AcceptanceEstimate([0.9, 0.9, 0.9], memory=500)
    for _ in range(100):
        estimate.observe([32, 16, 4])
    # At depth 2 the prior's 10 drafts have fallen to 10 e^(-1600 / 500) = 0.4 of some 500.
    assert estimate.by_depth == pytest.approx([0.5, 0.25, 0.9], abs=4e-3)
    # A draft loses weight as others follow, not as batches do: 32 (1 + x + x^2 + ...) with x = e^(-32 / 500).
    assert estimate.tried[0] == pytest.approx(32 / (1 - np.exp(-32 / 500)), rel=0.01)
    estimate.observe([32])  # a batch without drafts changes nothing
    estimate.observe([32, 0, 0])  # depths that are not reached keep their estimate
    assert estimate.by_depth[0] < 0.5 and estimate.by_depth[1:] == pytest.approx([0.25, 0.9], abs=4e-3)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=30), st.floats(0, 1))
def test_a_steady_acceptance_stays(batches, share):
    estimate = AcceptanceEstimate([share])
    for batch in batches:
        estimate.observe([batch, batch * share])
    assert estimate.by_depth[0] == pytest.approx(share)


def test_ranks_share_the_rest_in_halves():
    assert ranks(0.6, 3) == pytest.approx([0.6, 0.2, 0.1]) and ranks(1.0, 2) == [1.0, 0.0] and ranks(0.3, 1) == [0.3]


def test_what_is_old_counts_less():
    """Aging limits the weight of the old drafts, so that new ones count for more."""
    estimate = AcceptanceEstimate([0.5, 0.2], memory=1e9, prior_drafts=100)
    estimate.age(1, 4)
    assert estimate.by_depth == [0.5, 0.2]
    estimate.observe([8, 8, 8])
    assert estimate.by_depth == pytest.approx([58 / 108, 8.8 / 12])
    estimate.age(0, 1000)  # more than it had: nothing changes
    assert estimate.tried == pytest.approx([108, 12])
