"""speculation/scheduler.py: near the best on skewed rollouts, safe if no draft is accepted, and quick to recover."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import FixedPolicy, StepTimes
from respec_trainer.speculation.scheduler import DepthScheduler
from respec_trainer.speculation.shape import chain
from respec_trainer.speculation.simulation.simulator import Outcome, Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace
from tests.support.speculation import CPU, GPU, references, skewed_trace

STEPS = (0, 1, 2, 3, 5)
BARE = {"plain": Terms(fixed=1.0), "draft": Terms(), "extend": Terms()}  # without the verification
SLOWER = CostModel(BARE | {"verify": Terms(fixed=1.5)})
NEUTRAL = (0.7,) * 5


def settings_of(costs=CPU, **changes) -> DepthSettings:
    found = {"costs": costs.to_tuples(), "prior": NEUTRAL, "max_batch": 64, "max_context": 3000}
    return DepthSettings("adaptive", STEPS, **found | changes)


def replay(trace: Trace, costs, policy) -> Outcome:
    return simulate(trace, costs, lambda: policy, Setting())


def test_it_is_made_of_plain_data():
    """The settings reach the engine as JSON in its environment."""
    found = DepthSettings.of_json(settings_of(explore=0.01).to_json())
    scheduler = DepthScheduler.of(found)
    assert scheduler.candidates == STEPS and scheduler.explore == 0.01
    assert scheduler.times.at(8, 500) == pytest.approx(
        [CPU.cycle_seconds(chain(steps), 8, 500) for steps in STEPS], rel=0.05
    )
    with pytest.raises(ConfigError, match="costs and a prior acceptance"):
        DepthScheduler.of(settings_of(prior=()))


def test_it_knows_the_graphs_of_its_engine():
    """Those of the profile's engine at first. A batch of 33 computes 64 rows, so drafting pays only without padding."""
    steep = CostModel(dict.fromkeys(("plain", "draft", "extend"), Terms(fixed=1e-6)) | {"verify": Terms(token=1.0)})
    settings = settings_of(steep, graph_sizes=(32, 64), explore=0.0, prior=(0.9,) * 5)
    scheduler = DepthScheduler.of(DepthSettings.of_json(settings.to_json()))
    assert scheduler.times.at(33, 300)[1] == pytest.approx(64 * 2, rel=1e-3)
    scheduler.set_graph_sizes([33, 64])
    assert scheduler.times.at(33, 300)[1] == pytest.approx(33 * 2, rel=1e-3)
    assert scheduler.policy.times is scheduler.times


def test_a_short_prior_goes_on_as_it_ends():
    assert DepthScheduler.of(settings_of(prior=(0.8, 0.5))).estimate.by_depth == [0.8, 0.5, 0.5, 0.5, 0.5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 5)), min_size=1, max_size=80), st.integers(0, 100))
def test_ranks_choose_alike(batches, missed):
    """The choice is also always a candidate, for any number of kept drafts."""
    ranks = [DepthScheduler.of(settings_of()) for _ in range(2)]
    for batch, kept in batches:
        one, other = ([rank.choose(batch, 300.0, missed), rank.predicted()] for rank in ranks)
        assert one == other and one[0] in STEPS
        survivors = [batch if depth < kept else 0 for depth in range(one[0])]
        for rank in ranks:
            rank.observe(one[0], batch, survivors)


def test_depths_that_were_never_drafted_are_like_the_last_that_was():
    """Their estimate is not the prior, which is not of this drafter."""
    scheduler = DepthScheduler.of(settings_of(explore=0.0))
    scheduler.observe(2, 64, [60, 30])
    first, second, *deeper = scheduler.estimate.by_depth
    assert first > 0.9 and 0.48 < second < 0.55 and deeper == [second] * 3
    scheduler.observe(1, 64, [0])
    assert scheduler.estimate.by_depth[1:] == [second] * 4


def test_what_it_predicts():
    scheduler = DepthScheduler.of(settings_of(prior=(0.8,) * 5, explore=0.0))
    steps = scheduler.choose(2, 300.0, 0.0)
    tokens = sum(0.8**depth for depth in range(steps + 1))
    expected = tokens * CPU.step_seconds(2, 300) / CPU.cycle_seconds(chain(steps), 2, 300)
    assert steps > 1 and scheduler.predicted() == pytest.approx(expected, rel=0.02)
    off = DepthScheduler.of(settings_of(prior=(0.0,) * 5, explore=0.0))
    assert off.choose(2, 300.0, 0.0) == 0 and off.predicted() == 1.0
    unknown = DepthScheduler.of(DepthSettings("adaptive", (1, 2), 64, 3000, CPU.to_tuples(), (0.1, 0.1)))
    assert unknown.choose(2, 300.0, 0.0) == 1 and unknown.predicted() == 0.0  # plain decoding is no candidate


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(3))
def test_drafts_that_are_never_kept_cost_next_to_nothing(costs, seed):
    """The loss to plain decoding is at most 1 %, also for a drafter that was good before."""
    trace = skewed_trace(acceptance=[0.0], longest=1000, seed=seed)
    plain = replay(trace, costs, FixedPolicy(0)).makespan
    adaptive = replay(trace, costs, DepthScheduler.of(settings_of(costs))).makespan
    assert adaptive <= plain / 0.99


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
def test_acceptance_that_recovers_is_noticed(costs):
    """A rollout with a good drafter is within 3 % of the best after one with a drafter that is always wrong."""
    scheduler = DepthScheduler.of(settings_of(costs))
    poor, good = (skewed_trace(acceptance=[share], longest=1000) for share in (0.0, 0.8))
    assert replay(poor, costs, scheduler).off_fraction > 0.9
    assert replay(good, costs, scheduler).regret(references(good, costs, STEPS, Setting())) < 0.03


def test_acceptance_that_recovers_is_not_noticed_without_exploring():
    scheduler = DepthScheduler.of(settings_of(explore=0.0))
    replay(skewed_trace(acceptance=[0.0], longest=1000), CPU, scheduler)
    assert replay(skewed_trace(acceptance=[0.8], longest=1000), CPU, scheduler).off_fraction == 1.0


class Foreseeing(DepthScheduler):
    """Sums the tokens that it expects of each of its choices, from the speed-ups that it predicts."""

    expected = 0.0

    def choose(self, batch, context, missed):
        steps = super().choose(batch, context, missed)
        taken = self.times.at(batch, context)
        self.expected += batch * self.predicted() * taken[self.candidates.index(steps)] / taken[0]
        return steps


@pytest.mark.parametrize("share", [0.0, 0.45, 0.7, 0.9])
def test_expected_tokens_are_those_that_responses_keep(share):
    """Responses have 2 to 24 tokens; up to 13 % of their verified tokens lie behind an end."""
    scheduler = Foreseeing(StepTimes(CPU, STEPS, 64, 3000), NEUTRAL)
    generator = np.random.default_rng(0)
    traces = [
        Trace(np.full(256, 20), generator.integers(2, 25, 256), np.arange(256), np.full((256, 1), share))
        for _ in range(4)
    ]
    replay(traces[0], CPU, scheduler)
    expected, kept = scheduler.expected, 0.0
    for seed, trace in enumerate(traces[1:]):
        outcome = simulate(trace, CPU, lambda: scheduler, Setting(seed=seed))
        kept += outcome.tokens - len(trace)
    assert scheduler.expected - expected == pytest.approx(kept, rel=0.01)


def test_sequences_that_are_computed_after_their_ends_count_too():
    """Two of 20 sequences that plain decoding computes are over: a sequence of the batch keeps 18 / 20 of a token."""
    scheduler = DepthScheduler.of(settings_of(prior=(0.0,) * 5, explore=0.0))
    scheduler.observe(0, 10, [], Ends(10, 2))
    scheduler.observe(0, 8, [], Ends(8, 0, 2))
    assert scheduler.choose(8, 300.0, 0.0) == 0 and scheduler.predicted() == pytest.approx(0.9)


def test_the_time_of_what_is_chosen_earns_tries():
    scheduler = DepthScheduler(StepTimes(SLOWER, (0, 3), 64, 3000), (0.9,) * 3, 0.01)
    assert [scheduler.choose(1, 300.0, 0.0) for _ in range(10)] == [3] * 10
    assert scheduler.earned == pytest.approx(0.01 * 10 * 1.5)


def test_a_state_without_ends_is_read():
    """Checkpoints of earlier versions have none."""
    old = {name: value for name, value in DepthScheduler.of(settings_of()).state().items() if name != "endings"}
    scheduler = DepthScheduler.of(settings_of())
    scheduler.load_state(old)
    assert scheduler.state() == DepthScheduler.of(settings_of()).state()


class Counting(DepthScheduler):
    """Sums the cost of its tries by the cost model, as if the tries gained nothing."""

    spent = elapsed = 0.0
    within, base = False, 0

    def choose(self, batch, context, missed):
        self.within = self.trying > 0
        steps = super().choose(batch, context, missed)
        taken = self.times.at(batch, context)
        self.elapsed += taken[self.policy.current]
        if self.within:
            self.spent += taken[self.policy.current] - taken[self.base]
        return steps

    def _try(self, index, batch, context, missed):
        began = super()._try(index, batch, context, missed)
        if began:
            self.base, self.within = index, True
            self.spent += 0.0 if self.candidates[index] else self.times.catch_up(batch, context, missed)
        return began


def counting(explore: float = 0.005, costs=CPU) -> Counting:
    return Counting(StepTimes(costs, STEPS, 64, 3000), NEUTRAL, explore)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_tries_cost_no_more_than_their_share(share):
    """Count costs by the cost model as if no tried draft were kept; the batch changes a little within a try."""
    scheduler = counting()
    replay(skewed_trace(acceptance=[share], longest=1000), CPU, scheduler)
    assert 0 < scheduler.spent <= 0.0055 * scheduler.elapsed


def test_tries_at_the_start_of_rollouts_are_paid_before_the_next_one():
    """The first of 20 rollouts of 60 batches may go into debt, as each begins with all tokens read: a try takes
    8 batches of 1.5 s instead of 1 s. A rollout earns 0.24 s for the next one, so 16 later the debt is paid."""
    scheduler = Counting(StepTimes(SLOWER, (0, 3), 64, 3000), (0.1,) * 3, 0.004)
    tries = []
    for rollout in range(20):
        missed = 0
        for age in range(60):
            steps = scheduler.choose(1, 300.0, missed)
            scheduler.observe(steps, 1, [0] * steps)
            missed = 0 if steps else missed + 1
            if steps and age == 0:
                tries.append(rollout)
    assert tries == [0, 17]
    assert scheduler.spent == pytest.approx(2 * 8 * 0.5)
    assert scheduler.spent <= 0.004 * scheduler.elapsed + 4.0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 300), st.booleans()), min_size=1, max_size=8),
    st.floats(0.1, 1.0),
    st.sampled_from([1.0, 10.0]),
)
def test_no_try_costs_more_than_four_batches(phases, explore, steepness):
    """However much has been earned, and also at the start of a rollout. Without a draft that is kept, a deeper
    candidate costs what its cycle takes more, in every batch of the try."""
    draft = Terms(fixed=0.002 * steepness, weights=0.003 * steepness)
    scheduler = counting(explore, CostModel(CPU.pieces | {"draft": draft}))
    for batch, length, fresh in phases:
        for age in range(length):
            missed = 0 if fresh and not age else min(age, 50)
            before = scheduler.spent
            began = not scheduler.trying
            steps = scheduler.choose(batch, 300.0, missed)
            taken = scheduler.times.at(batch, 300.0)
            if began and scheduler.within:
                price = scheduler.spent - before - (taken[scheduler.policy.current] - taken[scheduler.base])
                extra = taken[scheduler.policy.current] - taken[scheduler.base]
                assert price + extra * (scheduler.trying + 1) <= 4 * taken[scheduler.base] * (1 + 1e-9)
            scheduler.observe(steps, batch, [0] * steps)


def test_a_try_lasts_until_enough_drafts_reach_the_new_depth():
    """A quarter of eight sequences keeps the first draft, so eight batches bring 16 drafts to the second depth."""
    costs = CostModel(BARE | {"plain": Terms(fixed=3.0), "draft": Terms(weights=0.1), "verify": Terms(fixed=1.0)})
    scheduler = DepthScheduler(StepTimes(costs, (0, 1, 3), 64, 3000), (0.25,) * 3, 1.0)
    tries = []
    for _ in range(120):
        steps = scheduler.choose(8, 300.0, 0.0)
        scheduler.observe(steps, 8, [2, 0, 0][:steps])
        tries.append(scheduler.trying)
    began = [after for before, after in zip(tries, tries[1:], strict=False) if after > before]
    assert began[1:] == [8 - 1] * 2, "the first was cut to what had been earned"


def test_a_try_is_cut_to_what_it_may_cost():
    """A depth whose cycle takes 1.5 times as long as a plain step, at the start of a rollout: 16 batches with one
    sequence each would give the evidence, and eight are allowed; at 2.5 times, two, which are too few to begin."""
    for extra, batches in ((0.5, 8), (1.5, 0)):
        costs = CostModel(BARE | {"verify": Terms(fixed=1.0 + extra)})
        scheduler = DepthScheduler(StepTimes(costs, (0, 3), 64, 3000), (0.1,) * 3, 1e-6)
        for _ in range(60):
            scheduler.choose(64, 300.0, 5.0)
            assert not scheduler.trying
        chosen = scheduler.choose(1, 300.0, 0.0)
        assert (chosen, scheduler.trying) == ((3, batches - 1) if batches else (0, 0))


def test_a_try_waits_until_the_drafter_has_caught_up():
    """Catching up may take several batches, in which the engine does not draft yet."""
    scheduler = DepthScheduler.of(settings_of(prior=(0.0,) * 5))
    for _ in range(2000):
        assert scheduler.choose(1, 300.0, 0.0) == 0 or scheduler.trying
        if scheduler.trying:
            break
    left = scheduler.trying
    assert all(scheduler.choose(1, 300.0, 9.0) > 0 for _ in range(50)) and scheduler.trying == left
    assert scheduler.choose(1, 300.0, 0.0) > 0 and scheduler.trying == left - 1


def test_a_drafter_that_has_become_better_drafts_deeper():
    """Drafts from the second on were never kept at first, so the scheduler stopped drafting them."""
    trace, outcomes = skewed_trace(acceptance=[0.9], longest=1000), []
    for explore in (0.005, 0.0):
        scheduler = DepthScheduler.of(settings_of(explore=explore))
        for _ in range(20):
            scheduler.observe(5, 64, [50, 0, 0, 0, 0])
        outcomes.append(replay(trace, CPU, scheduler))
    bold, timid = outcomes
    assert bold.spans[0][-1].steps == 5 and timid.spans[0][-1].steps == 1
    assert bold.makespan < 0.9 * timid.makespan


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_responses_that_differ(costs, share):
    """Each response has its own acceptance, so the batch's mean changes as responses end."""
    trace = skewed_trace(longest=1000, seed=1)
    generator = np.random.default_rng(5)
    own = 1 / (1 + np.exp(-(np.log(share / (1 - share)) + 0.5 * generator.standard_normal(len(trace)))))
    trace = Trace(trace.prompt, trace.length, trace.group, own[:, None])
    outcome = replay(trace, costs, DepthScheduler.of(settings_of(costs)))
    assert outcome.regret(references(trace, costs, STEPS, Setting())) < 0.06


def play(scheduler: DepthScheduler, batches: list, missed: int = 0) -> list:
    """Return its choice and prediction for each batch of (sequences, drafts kept of each). Every third ends one."""
    chosen = []
    for number, (batch, kept) in enumerate(batches):
        steps = scheduler.choose(batch, 300.0, missed)
        chosen.append((steps, scheduler.predicted()))
        drafts, ended = min(kept, steps), number % 3 == 0
        ends = Ends(batch * (1 + drafts) - ended * (drafts // 2), int(ended), int(ended))
        scheduler.observe(steps, batch, [batch if depth < kept else 0 for depth in range(steps)], ends)
    return chosen


BATCHES = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 5)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(BATCHES, BATCHES, st.integers(0, 100))
def test_one_that_goes_on_from_another_s_state_chooses_alike(before, after, missed):
    """Choices are equal to the bit, also in the middle of a try; the state passes through JSON."""
    first, second = DepthScheduler.of(settings_of(explore=0.2)), DepthScheduler.of(settings_of(explore=0.2))
    play(first, before, missed)
    state = json.dumps(first.state())
    assert len(state) < 1000
    second.load_state(json.loads(state))
    assert play(first, after, missed) == play(second, after, missed)
    assert first.state() == second.state()


@pytest.mark.parametrize("candidates", [(0, 1, 2), (0, 2, 4, 7)])
def test_another_s_candidates_leave_what_was_learnt_of_acceptance(candidates):
    first = DepthScheduler.of(settings_of(explore=0.2))
    play(first, [(32, 3)] * 40)
    prior = (0.1,) * candidates[-1]
    second = DepthScheduler(StepTimes(CPU, candidates, 64, 3000), prior, 0.2)
    second.load_state(first.state())
    known = min(5, candidates[-1])
    found = second.estimate.by_depth
    assert found[:known] == pytest.approx(first.estimate.by_depth[:known])
    assert found[known:] == [found[known - 1]] * (candidates[-1] - known)
    assert {steps for steps, _ in play(second, [(8, 3)] * 100)} <= set(candidates)
