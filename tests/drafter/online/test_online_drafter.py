"""drafter/online/online_drafter.py on one rank: it measures, learns, stops in time, and never ends a run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest
import torch

from respec_trainer.drafter.format import load_drafter
from respec_trainer.drafter.online import updates
from respec_trainer.errors import ConfigError
from respec_trainer.rollout.sglang.weights import FIXED_IN_DRAFTER, weight_shapes
from tests.support.drafters import target_config
from tests.support.learners import random_samples, score
from tests.support.online import LENGTHS, REWARDS, iterate, make_learner, same, save_start, target_model, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def model():
    return target_model()


@pytest.fixture
def make(folder):
    return functools.partial(make_learner, folder)


def test_it_learns_from_earlier_steps_and_reports_how_well_it_drafts(make, model):
    learner, history = make(), []
    start = weights(learner)
    for step in range(12):
        history.append(iterate(learner, model, step))
    assert not same(start, weights(learner)) and learner.version == "drafter-11"
    assert history[0]["drafter/updates"] == 0 and "drafter/loss" not in history[0]
    assert history[1]["drafter/updates"] == 2 and "drafter/top1" in history[1]
    assert history[-1]["drafter/loss"] < 0.8 * history[1]["drafter/loss"]
    assert sum(history[-1]["drafter/acceptance"]) > sum(history[1]["drafter/acceptance"]) + 0.1
    assert [metrics["drafter/staleness"] for metrics in history[:4]] == [1, 2, 2, 2]
    assert 0.9 < history[0]["drafter/coverage"] < 1.0 and not learner.said
    assert all(metrics["drafter/dropped"] == metrics["drafter/uniform_fallback"] == 0 for metrics in history)
    json.dumps(history)


def test_what_is_measured_is_the_drafter_that_served_before_it_learns_from_the_rollouts(make, model):
    """Measurements with and without training in between are bitwise the same."""
    trained, frozen = make(), make(cadence="interval", interval=100)
    results = [[iterate(learner, model, step) for step in range(2)] for learner in (trained, frozen)]
    assert trained.version == "drafter-1" and frozen.version == "drafter-0"
    for name in ("acceptance", "top1", "predicted_accept_length", "measured_accept_length"):
        assert results[0][1][f"drafter/{name}"] == results[1][1][f"drafter/{name}"]
    # drafter-1 was made while step 1 was drawn by drafter-0, drew step 2, and is measured on it in step 3.
    later = [[iterate(learner, model, step) for step in (2, 3)] for learner in (trained, frozen)]
    assert later[0][0]["drafter/top1"] == later[1][0]["drafter/top1"]
    assert later[0][1]["drafter/top1"] != later[1][1]["drafter/top1"]


def test_it_pushes_what_the_engine_takes(make, folder):
    assert {name for name, _ in make().named_tensors()} == set(weight_shapes(str(folder))) - set(FIXED_IN_DRAFTER)


def test_it_yields_when_generation_is_over(make, model):
    learner = make(batch_size=2)  # eight updates to be done
    iterate(learner, model, 0)
    polls = iter([True, True, True, True, True, False])
    metrics = iterate(learner, model, 1, generating=lambda: next(polls, False))
    assert 1 <= metrics["drafter/updates"] < 8 and metrics["time/learn_exposed"] > 0
    metrics = iterate(learner, model, 2, generating=lambda: False)
    assert metrics["drafter/updates"] == 0 and learner.version == "drafter-1"
    metrics = iterate(learner, model, 3)
    assert metrics["drafter/updates"] == 24 and metrics["time/learn_exposed"] == 0.0


def test_in_sync_mode_it_learns_from_the_step_itself(make, model):
    learner = make(mode="sync")
    metrics = iterate(learner, model, 0, generating=lambda: False)
    assert metrics["drafter/updates"] == 2 and learner.version == "drafter-1"
    assert metrics["time/learn_exposed"] > 0 and "drafter/top1" in metrics
    assert iterate(learner, model, 1)["drafter/staleness"] == 1


def test_every_interval_it_takes_its_share(make, model):
    learner = make(interval=2, batch_size=4)
    updates = [iterate(learner, model, step)["drafter/updates"] for step in range(5)]
    assert updates == [0, 0, 4, 0, 8], "half of 32, then half of 64, four at a time"


@pytest.mark.parametrize("bad", [torch.ones(4, 4), torch.full((4, 4), torch.inf)])
def test_rewards_without_differences_are_counted(make, model, bad):
    learner = make()
    assert iterate(learner, model, 0, rewards=bad)["drafter/uniform_fallback"] == 1
    assert {row.weight for row in learner.buffer.rows} == {1.0}
    assert iterate(learner, model, 1)["drafter/dropped"] == 0


@pytest.mark.parametrize("weighting", ["reward", "advantage", "uniform"])
def test_samples_that_the_reward_skipped_are_not_learned_from(make, model, weighting):
    learner, without = make(weighting=weighting), REWARDS.clone()
    without[1] = without[0, :2] = torch.nan
    samples = random_samples(LENGTHS, 0, learner.version)
    assert iterate(learner, model, 0, rewards=without, samples=samples)["drafter/uniform_fallback"] == 0
    rows, scored = learner.buffer.rows, (~without.isnan()).flatten().tolist()
    kept = [[*s.prompt_ids, *s.response_ids] for s, is_scored in zip(samples, scored, strict=True) if is_scored]
    assert sorted(row.tokens.tolist() for row in rows) == sorted(kept) and len(rows) == 10
    assert all(0.1 <= row.weight <= 4.0 for row in rows)
    assert iterate(learner, model, 1, rewards=torch.full((4, 4), torch.nan))["drafter/dropped"] == 0
    assert len(learner.buffer.rows) == 10, "of a step that was skipped whole nothing is stored"


def test_updates_that_are_not_finite_are_dropped_and_then_it_stays(make, model):
    learner = make(max_bad_updates=2)
    iterate(learner, model, 0)
    iterate(learner, model, 1)
    good, version = weights(learner), learner.version
    moments = learner.updates.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
    for row in learner.buffer.rows:
        row.snapshot.output_rows.fill_(torch.nan)
    metrics = iterate(learner, model, 2)
    assert metrics["drafter/dropped"] == 2 and metrics["drafter/frozen"] == 1 and metrics["drafter/updates"] == 0
    assert same(good, weights(learner)) and learner.version == version
    assert torch.equal(learner.updates.optimizers[0].state_dict()["state"][0]["exp_avg"], moments)
    assert "2 drafter updates in a row were not finite" in learner.said[0]
    learner.buffer.steps.clear()
    metrics = iterate(learner, model, 3)
    assert metrics["drafter/dropped"] == 0 and learner.version == version


def test_a_single_bad_update_does_not_stop_it(make, model):
    learner = make(max_bad_updates=3)
    iterate(learner, model, 0)
    stored = learner.buffer.steps[0].rows
    stored[5] = dataclasses.replace(stored[5], weight=torch.nan)
    metrics = iterate(learner, model, 1)
    assert (metrics["drafter/dropped"], metrics["drafter/updates"], metrics["drafter/frozen"]) == (1, 1, 0)
    assert all(tensor.isfinite().all() for tensor in weights(learner).values())


def test_running_out_of_memory_drops_the_update(make, model, monkeypatch):
    learner = make()
    iterate(learner, model, 0)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(updates, "drafter_loss", fail)
        assert iterate(learner, model, 1)["drafter/dropped"] == 2
    assert iterate(learner, model, 2)["drafter/updates"] > 0


def test_weights_that_overflow_are_replaced_by_those_that_served(make, model, monkeypatch):
    learner = make()
    for step in range(2):
        iterate(learner, model, step)
    served, schedule = weights(learner), learner.updates.schedules[-1]
    go_on = schedule.step  # the last thing that an update does

    def overflow():
        go_on()
        learner.drafter.fc.weight.data[3, 4] = torch.inf

    monkeypatch.setattr(schedule, "step", overflow)
    metrics = iterate(learner, model, 2)
    assert (metrics["drafter/updates"], metrics["drafter/dropped"], learner.version) == (0, 1, "drafter-1")
    assert same(weights(learner), served) and learner.bad_updates == 1
    assert iterate(learner, model, 3)["drafter/updates"] == 6 and learner.version == "drafter-2"


def test_a_restored_learner_continues_with_the_same_results(make, model):
    learner = make()
    for step in range(3):
        iterate(learner, model, step)
    other = make()
    other.load_state_dict(copy.deepcopy(learner.state_dict()))  # as if it had been in a file
    assert other.version == learner.version and other.accept_history == learner.accept_history
    for step in range(3, 5):
        one, two = iterate(learner, model, step), iterate(other, model, step)
        assert {k: v for k, v in one.items() if "time" not in k} == {k: v for k, v in two.items() if "time" not in k}
    assert same(weights(learner), weights(other))


def test_a_budget_below_one_batch_or_below_the_drafter_is_refused(make, model):
    with pytest.raises(ConfigError, match=r"drafter.memory_mb=1 is less than the 2 MB"):
        make(memory_mb=1)
    learner = make(memory_mb=2, batch_size=16)
    wide = random_samples([(200, 240)] * 16)
    with pytest.raises(ConfigError, match="that drafter.memory_mb leaves for rollouts hold"):
        learner.observe(wide, score(model, wide), REWARDS, 10.0)


def test_a_copy_is_of_the_drafter_as_it_was(make, model, tmp_path):
    learner = make()
    for step in range(2):
        iterate(learner, model, step)
    write, then = learner.copy_drafter(), weights(learner)
    iterate(learner, model, 2)
    write(tmp_path / "copy")
    copied = load_drafter(tmp_path / "copy", target_config(), dtype=torch.float32)[0].state_dict()
    assert learner.stateful and same(then, copied) and not same(weights(learner), copied)


def test_the_budget_counts_all_that_the_learner_holds(make, model):
    """The reported memory equals the sum over all tensors."""
    learner = make(matrix_lr=1e-2, compare_frozen=True)
    for step in range(3):
        metrics = iterate(learner, model, step)
    drafters = [t for d in (learner.drafter, learner.served, learner.began_as) for t in d.state_dict().values()]
    states = [state for o in learner.updates.optimizers for state in o.state.values()]
    moments = [value for state in states for value in state.values() if torch.is_tensor(value) and value.dim()]
    held = sum(t.nbytes for t in [*drafters, *moments, learner.updates.flat]) + learner.buffer.nbytes
    assert learner.nbytes == held and len(moments) > len(list(learner.drafter.parameters()))
    assert metrics["drafter/memory_mb"] == pytest.approx(held / 2**20)
    assert learner.buffer.budget + held - learner.buffer.nbytes == learner.settings.memory_mb * 2**20


def test_the_drafter_it_began_with_is_measured_beside_it(make, model):
    """Its metric equals that of a drafter that never learned, on the same responses."""
    learner, never = make(compare_frozen=True), make(interval=100)
    for step in range(4):
        ours, theirs = (iterate(one, model, step, samples=random_samples(LENGTHS, step)) for one in (learner, never))
    assert ours["drafter/frozen_accept_length"] == theirs["drafter/predicted_accept_length"]
    assert ours["drafter/acceptance"] != theirs["drafter/acceptance"]
    assert "drafter/frozen_accept_length" not in theirs


def test_a_draft_vocabulary_that_misses_much_is_reported_once(make, model):
    learner = make()
    samples = random_samples(LENGTHS)
    for sample in samples:
        sample.response_ids = [token // 2 * 2 + 2 for token in sample.response_ids]  # even: none is a draft token
    for step in range(2):
        assert iterate(learner, model, step, samples=samples)["drafter/coverage"] < 0.1
    assert len(learner.said) == 1 and "covers only 0.0% of response tokens" in learner.said[0]


@pytest.mark.parametrize("retention", ["recency", "reservoir"])
def test_lengths_of_what_it_was_asked_to_keep_and_of_what_it_kept(make, model, retention):
    """The means over a step's responses, and over those that the budget holds; skipped ones are not asked for."""
    learner = make(memory_mb=2, batch_size=2, retention=retention)
    lengths, skipped = [(3, 10 + 12 * i) for i in range(16)], REWARDS.clone()
    skipped[1, 1] = torch.nan
    for step in range(3):
        metrics = iterate(learner, model, step, rewards=skipped, samples=random_samples(lengths, step))
        kept = [row.response for row in learner.buffer.rows if row.step == step + 1]
        assert metrics["drafter/asked_length"] == pytest.approx(
            sum(n for i, (_, n) in enumerate(lengths) if i != 5) / 15
        )
        assert 0 < len(kept) < 15 and metrics["drafter/kept_length"] == pytest.approx(sum(kept) / len(kept))
    everything = iterate(make(), model, 0)
    assert everything["drafter/asked_length"] == everything["drafter/kept_length"] == sum(n for _, n in LENGTHS) / 16
    nothing = iterate(make(), model, 0, rewards=torch.full((4, 4), torch.nan))
    assert "drafter/asked_length" not in nothing and "drafter/kept_length" not in nothing


def test_a_response_that_no_budget_holds_is_counted_as_refused(make, model):
    learner = make(memory_mb=2, batch_size=2)
    iterate(learner, model, 0)
    lengths = [(3, 8)] * 15 + [(3, 400)]
    learner.buffer.budget = 200_000
    metrics = iterate(learner, model, 1, samples=random_samples(lengths, 1))
    assert metrics["drafter/refused_rows"] == 1
    assert metrics["drafter/asked_length"] == pytest.approx((15 * 8 + 400) / 16) and metrics["drafter/kept_length"] == 8


def test_only_new_responses_are_measured_on(make, model):
    """There is nothing to measure after a step whose responses were all skipped: older ones were learned from."""
    learner = make()
    iterate(learner, model, 0)
    measured = iterate(learner, model, 1, rewards=torch.full((4, 4), torch.nan))
    assert "drafter/measured_accept_length" in measured
    assert "drafter/measured_accept_length" not in iterate(learner, model, 2)
    assert "drafter/measured_accept_length" in iterate(learner, model, 3)
