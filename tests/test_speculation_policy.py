"""speculation/policy.py: the best choice where changing is free, patience where it is not, and quick decisions."""

from __future__ import annotations

import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.acceptance import tokens_per_cycle
from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import (
    AdaptivePolicy,
    FixedPolicy,
    OraclePolicy,
    middle_of,
    place_of,
    tokens_by_steps,
)
from respec_trainer.speculation.shape import chain
from tests.speculation import CPU, GPU

STEPS = [0, 1, 2, 3, 5]
batches = st.lists(st.tuples(st.integers(1, 64), st.floats(0.05, 0.95)), min_size=1, max_size=60)


def free(costs: CostModel) -> CostModel:
    return CostModel({piece: terms for piece, terms in costs.pieces.items() if piece != "catch_up"})


def pace(costs: CostModel, steps: int, batch: int, context: int, acceptance) -> float:
    """Seconds a token."""
    return costs.cycle_seconds(chain(steps), batch, context) / tokens_per_cycle(chain(steps), acceptance)


@given(st.integers(0, 100_000))
def test_places_of_contexts(context):
    place = place_of(context)
    assert place_of(context + 1) - place in (0, 1)
    assert abs(middle_of(place) - context) <= max(0.13 * context, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_tokens_of_all_candidates(acceptance):
    expected = [tokens_per_cycle(chain(steps), acceptance) for steps in STEPS]
    assert tokens_by_steps(STEPS, acceptance) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(batches, st.integers(16, 4000), st.sampled_from([CPU, GPU]))
def test_where_changing_is_free_the_best_is_taken(steps, context, costs):
    """Up to what a context's place in the table leaves open: up to an eighth of the context."""
    adaptive, oracle = AdaptivePolicy(free(costs), STEPS, 64, 4000), OraclePolicy(costs, STEPS)
    for batch, share in steps:
        chosen, best = (policy.choose(batch, context, [share]) for policy in (adaptive, oracle))
        lost = pace(costs, chosen, batch, context, [share]) / pace(costs, best, batch, context, [share])
        assert lost >= 1 - 1e-12 and (chosen == best or lost < 1.03)


def test_it_changes_when_staying_has_cost_the_price():
    """Plain decoding takes 1 s; a cycle of one draft 1.5 s, for 2 tokens or for 1; a catch-up 1.2 s, 0.6 s each way."""
    costs = CostModel(
        {"plain": Terms(fixed=1.0), "draft": Terms(), "verify": Terms(fixed=1.5), "extend": Terms()}
        | {"catch_up": Terms(fixed=1.2)}
    )
    policy = AdaptivePolicy(costs, [0, 1], max_batch=1, max_context=100)
    assert [policy.choose(1, 10, [0.0]) for _ in range(3)] == [0, 0, 0]
    # Every plain token loses 0.25 s against half a cycle: 0.75 s after three of them.
    assert [policy.choose(1, 10, [1.0]) for _ in range(5)] == [0, 0, 0, 1, 1]
    # A cycle that gains one token loses 0.5 s against a plain step: 1.0 s after two of them.
    assert [policy.choose(1, 10, [0.0]) for _ in range(4)] == [1, 1, 0, 0]
    policy.reset()
    assert policy.choose(1, 10, [1.0]) == 1  # the first choice is free
    assert policy.fresh().choose(1, 10, [0.0]) == 0 and policy.choose(1, 10, [0.0]) == 1


@settings(max_examples=50, deadline=None)
@given(batches, st.floats(0, 0.5))
def test_changing_never_costs_more_than_staying_has(steps, switch_seconds):
    """Prices paid against what all choices lost to the best at each moment, both by the policy's own tables."""
    policy = AdaptivePolicy(CPU, STEPS, 64, 1000, switch_seconds)
    context = round(middle_of(place_of(500)))
    paid = lost = 0.0
    before = None
    for batch, share in steps:
        chosen = policy.choose(batch, context, [share])
        if before is not None and chosen != before:
            crosses = 0 in (chosen, before)
            paid += switch_seconds + (CPU.catch_up_seconds(batch, middle_of(place_of(context))) / 2 if crosses else 0.0)
        paces = {s: pace(CPU, s, batch, middle_of(place_of(context)), [share]) for s in STEPS}
        lost += (paces[chosen] - min(paces.values())) * tokens_per_cycle(chain(chosen), [share])
        assert paid <= lost + 1e-9
        before = chosen


def test_beyond_its_tables_a_policy_takes_their_edge():
    policy = AdaptivePolicy(CPU, STEPS, 64, 1000)
    assert policy.choose(500, 10**6, [0.5]) == policy.fresh().choose(64, 1000, [0.5])
    assert FixedPolicy(3).choose(500, 10**6, []) == 3


@pytest.mark.parametrize("candidates", [[], [1, 0], [0, 0], [-1, 2]])
def test_candidates_rise(candidates):
    with pytest.raises(ConfigError, match="candidate steps must rise"):
        AdaptivePolicy(CPU, candidates, 64, 1000)


def test_decisions_take_less_than_50_us():
    """With nine candidates and every batch another; the best of some rounds, for others use the machine too."""
    policy = AdaptivePolicy(CPU, list(range(9)), 256, 32_768)
    acceptance = [0.8, 0.75, 0.7, 0.65, 0.6]

    def decide():
        for batch in range(1, 257):
            policy.choose(batch, 100 * batch, acceptance)

    assert min(timeit.repeat(decide, number=1, repeat=10)) / 256 < 50e-6
