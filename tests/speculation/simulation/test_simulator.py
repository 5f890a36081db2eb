"""speculation/simulation/simulator.py: rollouts counted by hand, properties of every rollout, and the references."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import FixedPolicy, StepTimes
from respec_trainer.speculation.scheduler import DepthScheduler
from respec_trainer.speculation.shape import chain
from respec_trainer.speculation.simulation.informed import InformedPolicy
from respec_trainer.speculation.simulation.simulator import Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace
from tests.support.speculation import CPU, GPU, references, skewed_trace

# A decode step takes 1 s, a cycle 2 s, whatever the batch.
SIMPLE = {
    "plain": Terms(fixed=1.0),
    "draft": Terms(fixed=0.5),
    "verify": Terms(fixed=1.0),
    "extend": Terms(fixed=0.5),
}
STEPS = [0, 1, 3]


def trace_of(lengths, acceptance=(1.0,), prompt=10, groups=None) -> Trace:
    """Make responses with `lengths` decoded tokens after the first token, which comes with the prompt."""
    count = len(lengths)
    groups = np.arange(count) if groups is None else np.array(groups)
    return Trace(
        np.full(count, prompt), np.array(lengths) + 1, groups, np.tile(np.array(acceptance, dtype=float), (count, 1))
    )


def run(trace: Trace, steps: int = 0, costs: CostModel | None = None, **keys):
    return simulate(trace, costs or CostModel(SIMPLE), lambda: FixedPolicy(steps), Setting(**keys))


def test_two_responses_without_speculation():
    outcome = run(trace_of([3, 5]))
    assert outcome.makespan == 5.0 and outcome.tokens == 10 and outcome.tokens_per_second == 2.0
    assert outcome.mean_batch == 1.6  # three seconds of two, two of one
    assert outcome.off_fraction == 1.0 and outcome.accept_length == 1.0 and outcome.switches == 0


@pytest.mark.parametrize("sampled", [True, False])
def test_drafts_that_are_all_kept(sampled):
    outcome = run(trace_of([5]), steps=1, sampled=sampled)
    assert outcome.makespan == 6.0 and outcome.off_fraction == 0.0
    assert [span.tokens for span in outcome.spans[0]] == [2, 2, 1]  # the last draft is beyond the end
    assert outcome.accept_length == pytest.approx(5 / 3)


def test_a_response_of_one_token_is_not_decoded():
    costs = CostModel(SIMPLE | {"prefill": Terms(fixed=2.0)})
    assert run(trace_of([0, 0, 3]), costs=costs).makespan == 5.0
    outcome = run(trace_of([0, 0, 3]), costs=costs, slots=1)  # three prompts, one after the other
    assert outcome.makespan == 9.0 and outcome.tokens == 6


def test_drafts_that_are_never_kept():
    assert run(trace_of([5], acceptance=[0.0]), steps=3).makespan == 10.0


def test_expected_drafts():
    """A cycle gains 1 + 1/2 + 1/4 tokens, so 7 tokens take four cycles."""
    assert run(trace_of([7], acceptance=[0.5]), steps=2, sampled=False).makespan == 8.0


def test_slots_are_filled_as_they_become_free():
    assert run(trace_of([3, 5, 2]), slots=1).makespan == 10.0
    outcome = run(trace_of([3, 5, 2]), slots=2)
    assert outcome.makespan == 5.0 and [span.batch for span in outcome.spans[0]] == [2] * 5
    outcome = run(trace_of([3, 5, 2]), slots=2, min_free_slots=2)  # the third waits for both
    assert outcome.makespan == 7.0 and [span.batch for span in outcome.spans[0]] == [2, 2, 2, 1, 1, 1, 1]


def test_engines_share_the_requests():
    lengths = [5, 1, 1, 1]
    assert run(trace_of(lengths), engines=2, slots=1).makespan == 6.0  # 5 + 1 and 1 + 1
    assert run(trace_of(lengths), engines=2, slots=1, balance="queue").makespan == 5.0  # 5 and 1 + 1 + 1
    outcome = run(trace_of(lengths), engines=4, slots=8, balance="queue")  # a common queue is not emptied by the first
    assert [len(spans) for spans in outcome.spans] == lengths
    assert len(run(trace_of([2]), engines=3).spans) == 3  # some have nothing to do


def test_a_group_s_prompt_is_read_once():
    costs = CostModel(SIMPLE | {"prefill": Terms(fixed=2.0, token=0.1)})
    read = run(trace_of([1, 1, 1, 1], groups=[0, 0, 1, 1]), costs=costs)
    assert read.makespan == pytest.approx(2.0 + 20 * 0.1 + 1.0) and "prefill" not in read.not_counted
    # One response after the other: for the second of the group all but the prompt's last token is cached.
    one_by_one = run(trace_of([1, 1], groups=[0, 0]), costs=costs, slots=1)
    assert one_by_one.makespan == pytest.approx(2.0 + 1.0 + 1.0 + 2.0 + 0.1 + 1.0)


def test_cached_prompts_cost_a_token_each():
    """The first two of a group of four are read together, and the other two find the prompt in the cache."""
    costs = CostModel(SIMPLE | {"prefill": Terms(token=0.1)})
    outcome = run(trace_of([1, 1, 1, 1], groups=[0, 0, 0, 0]), costs=costs, slots=2)
    assert outcome.makespan == pytest.approx(10 * 0.1 + 1.0 + 2 * 0.1 + 1.0)


class Script:
    """A policy that follows a fixed list of choices and records its calls."""

    def __init__(self, steps, informed=False):
        self.steps, self.asked, self.seen, self.told = iter(steps), [], [], []
        if informed:
            self.inform = lambda acceptance, remaining: self.told.append((acceptance.tolist(), remaining.tolist()))

    def choose(self, batch, context, missed):
        self.asked.append((batch, context, missed))
        return next(self.steps)

    def observe(self, steps, batch, survivors, ends):
        self.seen.append((steps, batch, survivors, ends))


def test_going_on_costs_a_catch_up_of_what_was_missed():
    costs = CostModel(SIMPLE | {"catch_up": Terms(token=0.1), "switch": Terms(fixed=0.25)})
    policy = Script([0, 0, 1, 0])
    outcome = simulate(trace_of([5]), costs, lambda: policy, Setting())
    # Two plain steps, two tokens to catch up with, a cycle of two tokens, a plain step; two changes.
    assert outcome.makespan == pytest.approx(1 + 1 + 0.25 + 0.2 + 2 + 0.25 + 1) and outcome.switches == 2
    assert policy.asked == [(1, 10, 0), (1, 11, 1), (1, 12, 2), (1, 14, 0)]
    went_on, ended = Ends(1, 0), Ends(1, 1)
    assert policy.seen == [(0, 1, [], went_on)] * 2 + [(1, 1, [1], Ends(2, 0)), (0, 1, [], ended)]
    informed = Script([0, 0, 1, 0], informed=True)
    assert simulate(trace_of([5]), costs, lambda: informed, Setting()).makespan == 5.0
    assert informed.told == [([[1.0]], [left]) for left in (5, 4, 3, 1)]
    assert run(trace_of([5])).not_counted == ("prefill", "catch_up") and outcome.not_counted == ("prefill",)


def test_new_sequences_have_missed_nothing():
    policy = Script([0, 0, 0, 1, 1])
    costs = CostModel(SIMPLE | {"catch_up": Terms(token=0.1)})
    # The first response ends after two steps and its slot goes to the third; the second has missed two tokens.
    outcome = simulate(trace_of([2, 6, 4]), costs, lambda: policy, Setting(slots=2))
    assert policy.asked[:4] == [(2, 10, 0), (2, 11, 1), (2, 11, 1), (2, 12, 2)]  # (2 + 0) / 2, (3 + 1) / 2
    assert outcome.makespan == pytest.approx(3 * 1 + 0.4 + 2 * 2)


traces = st.builds(
    trace_of,
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(1, 50),
)
run_settings = st.builds(
    Setting,
    engines=st.integers(1, 3),
    slots=st.integers(2, 6),
    min_free_slots=st.integers(1, 2),
    balance=st.sampled_from(["shares", "queue"]),
    sampled=st.booleans(),
    seed=st.integers(0, 2**40),
)


def scheduled(costs, candidates, slots, longest, prior=(0.6, 0.5, 0.4), explore=0.005):
    return DepthScheduler(StepTimes(costs, candidates, slots, longest), prior, explore)


@settings(max_examples=60, deadline=None)
@given(
    traces,
    run_settings,
    st.sampled_from([CPU, GPU]),
    st.floats(0, 0.1),
    st.sampled_from(["adaptive", "greedy", "weighted", "critical", *STEPS]),
)
def test_what_holds_for_every_rollout(trace, setting, costs, switch, name):
    costs = CostModel(costs.pieces | {"switch": Terms(fixed=switch)})

    def make():
        if name == "adaptive":
            return scheduled(costs, STEPS, 12, 100)
        return FixedPolicy(name) if name in STEPS else InformedPolicy(name, costs, STEPS)

    outcome = simulate(trace, costs, make, setting)
    assert outcome.tokens == pytest.approx(trace.tokens)
    assert len(outcome.spans) == setting.engines
    for spans in outcome.spans:
        assert all(1 <= span.batch <= setting.slots and span.tokens > 0 for span in spans)
        assert all(span.tokens <= span.batch * (span.steps + 1) + 1e-9 for span in spans)
        assert all(then.start >= span.start + span.seconds - 1e-9 for span, then in pairwise(spans))
    assert outcome.makespan == pytest.approx(_end(outcome), abs=switch + costs.catch_up_seconds(6, 90))
    assert simulate(trace, costs, make, setting) == outcome


def _end(outcome) -> float:
    return max(spans[-1].start + spans[-1].seconds for spans in outcome.spans if spans)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(20, 400), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(2, 6),
    st.sampled_from([CPU, GPU]),
)
def test_no_policy_beats_greedy_where_responses_are_alike(lengths, acceptance, slots, costs):
    """If all responses have one acceptance and gain the expected tokens, they end in the same order under every policy.

    Then the fastest choice at every moment gives the fastest rollout, except for the last cycle of each response, which
    may draft beyond its end. Prompts cost nothing here, because the number read together depends on when responses end.
    """
    costs = CostModel({piece: terms for piece, terms in costs.pieces.items() if piece != "prefill"})
    trace, setting = trace_of(lengths, acceptance), Setting(slots=slots, sampled=False)
    greedy = simulate(trace, costs, lambda: InformedPolicy("greedy", costs, STEPS), setting)
    beyond = len(lengths) * costs.cycle_seconds(chain(3), slots, 450)
    for make in (
        lambda: scheduled(costs, STEPS, slots, 450),
        *(lambda steps=steps: FixedPolicy(steps) for steps in STEPS),
    ):
        assert simulate(trace, costs, make, setting).makespan >= greedy.makespan - beyond


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.75])
def test_skewed_rollouts(costs, share):
    """The adaptive policy stays within 3 % of the best, and within 1 % of plain decoding and all fixed steps.

    Drafts are sampled, turning speculation on costs a catch-up, and the policy starts from a wrong estimate. The limit
    is 1.5 % where drafts are kept slightly too rarely to pay: there a try needs an expensive catch-up.
    """
    trace = skewed_trace(acceptance=[share, 0.9 * share, 0.8 * share])
    steps = [0, 1, 2, 3, 5]

    def made(make):
        return simulate(trace, costs, make, Setting())

    best = references(trace, costs, steps, Setting())
    adaptive = made(lambda: scheduled(costs, steps, 64, 2200))
    greedy, fixed = best[0], best[3:]
    assert adaptive.regret(best) < 0.03
    assert adaptive.makespan < (1.015 if share == 0.2 else 1.01) * min(outcome.makespan for outcome in fixed)
    # Greedy is the best on average only: another choice can be lucky with the drafts of the last responses.
    assert 0 <= greedy.regret(best) < 0.01 and min(outcome.regret(best) for outcome in best) == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"engines": 0}, "engines=0 must be at least 1"),
        ({"slots": 0}, "slots=0"),
        ({"min_free_slots": 9, "slots": 8}, "min_free_slots=9 are never free of slots=8"),
    ],
)
def test_settings_that_cannot_be(keys, words):
    with pytest.raises(ConfigError, match=words):
        Setting(**keys)
