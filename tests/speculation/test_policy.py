"""speculation/policy.py: the best choice if a change is free, a wait if it costs time, and quick decisions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.acceptance import tokens_per_cycle
from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import (
    AdaptivePolicy,
    FixedPolicy,
    StepTimes,
    ThresholdPolicy,
    index_of,
    middle_of,
    tokens_by_steps,
)
from respec_trainer.speculation.shape import chain
from tests.support.speculation import CPU, GPU

STEPS = [0, 1, 2, 3, 5]
batches = st.lists(st.tuples(st.integers(1, 64), st.floats(0.05, 0.95)), min_size=1, max_size=60)


def free(costs: CostModel) -> CostModel:
    return CostModel({piece: terms for piece, terms in costs.pieces.items() if piece != "catch_up"})


def gains(acceptance, candidates=STEPS) -> list[float]:
    return tokens_by_steps(candidates, acceptance)


def pace(costs: CostModel, steps: int, batch: int, context: int, acceptance) -> float:
    """Seconds a token."""
    return costs.cycle_seconds(chain(steps), batch, context) / tokens_per_cycle(chain(steps), acceptance)


@given(st.integers(0, 100_000))
def test_indices_of_contexts(context):
    index = index_of(context)
    assert index_of(context + 1) - index in (0, 1)
    assert abs(middle_of(index) - context) <= max(0.13 * context, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_tokens_of_all_candidates(acceptance):
    expected = [tokens_per_cycle(chain(steps), acceptance) for steps in STEPS]
    assert tokens_by_steps(STEPS, acceptance) == pytest.approx(expected)


def adaptive(costs: CostModel, candidates=STEPS, max_batch: int = 64, max_context: int = 4000) -> AdaptivePolicy:
    return AdaptivePolicy(StepTimes(costs, candidates, max_batch, max_context))


@settings(max_examples=50, deadline=None)
@given(batches, st.integers(16, 4000), st.sampled_from([CPU, GPU]), st.integers(0, 500))
def test_where_changing_is_free_the_best_is_taken(steps, context, costs, missed):
    """The choice may differ by the table's resolution: one entry spans up to an eighth of the context."""
    policy = adaptive(free(costs))
    for batch, share in steps:
        chosen = STEPS[policy.choose(batch, context, missed, gains([share]))]
        paces = {each: pace(costs, each, batch, context, [share]) for each in STEPS}
        assert paces[chosen] < 1.03 * min(paces.values())


# Plain decoding takes 1 s, a cycle of one draft 1.5 s, for 2 tokens or for 1; catching up 0.1 s a token.
BY_HAND = CostModel(
    {"plain": Terms(fixed=1.0), "draft": Terms(), "verify": Terms(fixed=1.5), "extend": Terms()}
    | {"catch_up": Terms(token=0.1)}
)


def choices(policy: AdaptivePolicy, missed: list[float], share: float) -> list[int]:
    return [policy.choose(1, 100, each, gains([share], policy.times.candidates)) for each in missed]


def test_going_on_waits_for_a_share_of_its_price():
    """Every plain token loses 0.25 s against half a cycle. To win back 2 s of catching up takes fewer than the 20
    tokens that were missed, so the policy waits for half of the 2 s."""
    policy = adaptive(BY_HAND, [0, 1])
    assert choices(policy, [0], 0.0) == [0]
    assert choices(policy, [20] * 6, 1.0) == [0, 0, 0, 0, 1, 1]


def test_going_on_is_put_off_where_it_may_not_win_its_price():
    """A token wins 0.05 s, so 20 tokens do not pay for 2 s: the policy waits until twice as much has been lost."""
    costs = CostModel(BY_HAND.pieces | {"verify": Terms(fixed=1.9)})
    policy = adaptive(costs, [0, 1])
    assert choices(policy, [0], 0.0) == [0]
    on = choices(policy, [20] * 200, 1.0)
    assert on.index(1) in (80, 81)  # 4 s / 0.05 s


def test_going_off_and_going_on_with_nothing_missed_are_free():
    policy = adaptive(BY_HAND, [0, 1])
    assert choices(policy, [0], 1.0) + choices(policy, [0], 0.0) + choices(policy, [0], 1.0) == [1, 0, 1]


def test_deeper_drafts_have_no_catch_up_of_their_own():
    """The drafter is reading already, over several batches; the tokens that it has not read do not make it dearer."""
    policy = adaptive(BY_HAND, [0, 1, 3])
    policy.change(1)
    assert choices(policy, [20], 1.0) == [2], "the index of three drafts"


def test_a_change_forgets_what_was_lost():
    policy = adaptive(BY_HAND, [0, 1])
    assert choices(policy, [0], 0.0) + choices(policy, [20, 20], 1.0) == [0, 0, 0]
    assert policy.lost[1] > 0
    policy.change(1)
    assert policy.lost == [0.0, 0.0] and policy.current == 1


def test_every_change_costs_a_switch():
    """A switch costs 0.5 s; a cycle that gains one token loses 0.5 s against a plain step."""
    policy = adaptive(CostModel(BY_HAND.pieces | {"switch": Terms(fixed=0.5)}), [0, 1])
    assert choices(policy, [0], 1.0) == [1]
    assert choices(policy, [0, 0, 0], 0.0) == [1, 0, 0]


@settings(max_examples=50, deadline=None)
@given(batches, st.floats(0, 0.5))
def test_changing_costs_no_more_than_its_share_of_what_staying_has(steps, switch):
    """Compare the costs of changes with the time that all choices lost to the best, both by the policy's own tables."""
    policy = adaptive(CostModel(CPU.pieces | {"switch": Terms(fixed=switch)}))
    context = round(middle_of(index_of(500)))
    paid = lost = missed = 0.0
    before = None
    for batch, share in steps:
        chosen = STEPS[policy.choose(batch, context, missed, gains([share]))]
        if before is not None and chosen != before:
            paid += switch + (CPU.catch_up_seconds(batch, context, missed) if not before else 0.0)
        missed = 0.0 if chosen else missed + 1
        paces = {s: pace(CPU, s, batch, middle_of(index_of(context)), [share]) for s in STEPS}
        lost += (paces[chosen] - min(paces.values())) * tokens_per_cycle(chain(chosen), [share])
        assert paid * AdaptivePolicy.TRUST <= lost + 1e-9
        before = chosen


def test_beyond_its_tables_a_policy_takes_their_edge():
    times = StepTimes(CPU, STEPS, 64, 1000)
    assert times.at(500, 10**6) == times.at(64, 1000) and times.at(3, 99.9) == times.at(3, 99)
    assert times.catch_up(8, 100, 200) == times.catch_up(8, 100, 100) == CPU.catch_up_seconds(8, 100)
    assert times.catch_up(8, 100, 0) == 0.0
    assert FixedPolicy(3).choose(500, 10**6, 0) == 3


def test_between_graphs_a_batch_takes_as_long_as_the_larger_one():
    """But for what depends on the sequences' own contexts: here attention costs nothing."""
    bare = CostModel({piece: Terms(fixed=1.0, weights=2.0, token=0.5, overlap=2.0) for piece in CPU.pieces})
    times = StepTimes(bare, STEPS, 64, 1000).with_graphs([1, 4, 16, 40])
    plain = StepTimes(bare, STEPS, 64, 1000)
    for batch, graph in ((1, 1), (2, 4), (4, 4), (5, 16), (17, 40), (40, 40), (41, 41), (64, 64)):
        assert times.at(batch, 300) == plain.at(graph, 300)
    assert times.with_graphs((1, 4, 16, 40)) is times and plain.with_graphs(()) is plain
    assert times.with_graphs(()).at(5, 300) == plain.at(5, 300)


def test_a_threshold():
    policy = ThresholdPolicy(3, 16)
    assert [policy.choose(batch, 100, 0) for batch in (1, 16, 17)] == [3, 3, 0]


@pytest.mark.parametrize("candidates", [[], [1, 0], [0, 0], [-1, 2]])
def test_candidates_rise(candidates):
    with pytest.raises(ConfigError, match="candidate steps must rise"):
        StepTimes(CPU, candidates, 64, 1000)
