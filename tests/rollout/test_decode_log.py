"""decode_log.py, and inside/: decode_recorder.py, depth_choice.py, simulated_acceptance.py."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DecodeLog, DepthSettings
from respec_trainer.rollout.ends import Ends
from respec_trainer.rollout.sglang.inside.decode_recorder import DecodeRecorder, survivors_of
from respec_trainer.rollout.sglang.inside.depth_choice import DepthChooser
from respec_trainer.rollout.sglang.inside.simulated_acceptance import SimulatedAcceptance, kept_rate
from tests.support.depth_choosers import chosen_by

FIXED = DepthSettings("fixed", (0, 1, 3), max_batch=8, max_context=256, fixed=3)
SCRIPTED = replace(FIXED, **chosen_by("Scripted", [3, 0, 1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidates": (3, 1)}, "must rise"),
        ({"candidates": ()}, "must rise"),
        ({"candidates": (-1, 3)}, "must rise"),
        ({"candidates": (0,)}, "without speculation instead"),
        ({"fixed": 2}, "not one of the candidate steps"),
        ({"mode": "adaptive"}, "chosen by costs"),
        ({"catch_up_tokens": 0}, "never catch up"),
        ({"simulated_accept_length": 4.5}, "not between 1 and 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(FIXED, **changes)


def test_settings_are_the_same_after_json():
    settings = replace(SCRIPTED, costs={"plain": (1.0, 0.0, 2.0)}, backlog_mb=3, timed=True, off="warm")
    assert settings.policy_options == {"script": [3, 0, 1]}
    assert DepthSettings.of_json(settings.to_json()) == settings
    assert DepthSettings.of_json(FIXED.to_json()) == FIXED


def test_survivors_count_sequences_by_depth():
    assert survivors_of([0, 3, 1, 3], 3) == [3, 2, 2]
    assert survivors_of([0, 0], 0) == []


def test_results_go_to_their_batches():
    """The second batch starts before the first one's results arrive, as with overlapped scheduling."""
    recorder = DecodeRecorder()
    first = recorder.begin(False, 2, 10.0)
    first.steps = 3
    recorder.begin(True, 1, 5.0, tokens=5)
    second = recorder.begin(False, 3, 11.0)
    assert len(recorder.take()) == 0, "no row while the first batch is unfinished"
    assert recorder.settle([2, 0], 3) is first
    log = recorder.take(failures=1)
    assert log.steps.tolist() == [3, 0] and log.prefill.tolist() == [False, True] and log.failures == 1
    assert log.tokens.tolist() == [3, 5] and log.survivors.tolist() == [[1, 1, 0], [0, 0, 0]]
    with pytest.raises(RuntimeError, match=r"results of 2 sequences.*\[3\]"):
        recorder.settle([0, 0], 2)
    assert recorder.settle([0, 0, 0], 3) is second
    log = recorder.take()
    assert log.batch.tolist() == [3] and log.survivors.shape == (1, 0) and len(recorder.take()) == 0


def test_nested_parts_count_once():
    recorder = DecodeRecorder()
    row = recorder.begin(False, 1, 1.0)
    with recorder.timing("catch_up"):
        with recorder.timing("extend"):
            time.sleep(0.001)
        time.sleep(0.001)
    assert row.catch_up >= 0.002 and row.extend == 0
    with recorder.timing("extend"):
        time.sleep(0.001)
    assert row.extend >= 0.001


def test_the_clock_waits_for_the_device_at_both_ends():
    waits = []
    recorder = DecodeRecorder(wait=lambda: waits.append(1))
    recorder.begin(False, 1, 1.0)
    with recorder.timing("verify"):
        assert len(waits) == 1
    assert len(waits) == 2


def test_rows_that_are_not_taken_are_dropped_and_counted():
    recorder = DecodeRecorder(most_rows=10)
    for i in range(26):
        recorder.begin(False, 1, float(i))
        recorder.settle([0], 1)
    log = recorder.take()
    assert log.dropped == 20 and log.context.tolist() == [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]
    assert recorder.take().dropped == 0


def test_a_log_is_the_same_after_bytes():
    recorder = DecodeRecorder()
    for steps in (0, 3):
        recorder.begin(False, 2, 7.5).steps = steps
        recorder.settle([min(steps, 2), 0], 4)
    log = replace(recorder.take(failures=2), state='{"turn": 3}')
    back = DecodeLog.of_bytes(log.to_bytes())
    assert back.failures == 2 and back.dropped == 0 and back.state == log.state
    assert type(back.failures) is type(back.dropped) is int, "metrics are written as JSON"
    for name, column in log.to_arrays().items():
        np.testing.assert_array_equal(getattr(back, name), column)
        assert np.asarray(getattr(back, name)).dtype == column.dtype
    assert len(DecodeLog.of_bytes(DecodeLog().to_bytes())) == 0


def test_fixed_and_random_choices():
    choice = DepthChooser(FIXED).choose(4, 10.0, 0.0)
    assert choice == (3, False)
    assert DepthChooser(replace(FIXED, fixed=0, off="warm")).choose(4, 10.0, 0.0) == (0, True)
    settings = replace(FIXED, mode="random", seed=1)
    drawn, again = ([c.choose(4, 10.0, 0.0) for _ in range(200)] for c in map(DepthChooser, (settings, settings)))
    assert drawn == again, "tensor-parallel ranks must draw alike"
    assert {steps for steps, _ in drawn} == {0, 1, 3} and {warm for steps, warm in drawn if not steps} == {True, False}


def test_an_adaptive_chooser_asks_its_policy():
    chooser = DepthChooser(SCRIPTED)
    assert [chooser.choose(4, 10.0, 0.0).steps for _ in range(4)] == [3, 0, 1, 3]
    assert chooser.predicted() == 1.5 and not chooser.failed
    assert DepthChooser(FIXED).predicted() == 0.0, "unknown"


def test_a_policy_may_go_off_without_a_candidate_for_it():
    """Every engine has the state without speculation, because a failed chooser needs it."""
    chooser = DepthChooser(replace(FIXED, candidates=(1, 3), **chosen_by("Scripted", [3, 0])))
    assert [chooser.choose(4, 10.0, 0.0).steps for _ in range(2)] == [3, 0] and not chooser.failed


def test_after_a_failure_the_drafter_reads_nothing(capsys):
    """Not even in the batch for which the policy fails."""
    chooser = DepthChooser(replace(FIXED, off="warm", **chosen_by("Broken", [0])))
    assert [chooser.choose(4, 10.0, 0.0) for _ in range(6)] == [(0, True)] * 4 + [(0, False)] * 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["raises", "is no candidate", "observes", "predicts"])
def test_a_policy_that_fails_turns_speculation_off(broken, capsys):
    policy = {"raises": "Broken", "predicts": "Unpredictable"}.get(broken, "Scripted")
    script = (1, 1, 1, 1, 2) if broken == "is no candidate" else (1,)
    chooser = DepthChooser(replace(FIXED, **chosen_by(policy, script)))
    assert [chooser.choose(4, 10.0, 0.0).steps for _ in range(4)] == [1] * 4
    if broken == "observes":
        chooser.observe(1, 4, [], Ends(4, 0))
    elif broken == "predicts":
        assert chooser.predicted() == 0.0
    assert [chooser.choose(4, 10.0, 0.0) for _ in range(3)] == [(0, False)] * 3
    chooser.observe(0, 4, [], Ends(4, 0))
    assert chooser.failures == 1 and chooser.predicted() == 0.0
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_policy_s_state_is_restored():
    settings = replace(FIXED, **chosen_by("Remembering", [3, 0, 1]))
    first, second = DepthChooser(settings), DepthChooser(settings)
    assert first.choose(4, 10.0, 0.0).steps == 3
    second.load_state(first.state())
    assert [chooser.choose(4, 10.0, 0.0).steps for chooser in (first, second)] == [0, 0]
    assert DepthChooser(SCRIPTED).state() == DepthChooser(FIXED).state() == "", "these have no state"
    with pytest.raises(ValueError, match="no depth policy with a state to restore"):
        DepthChooser(FIXED).load_state("{}")


def test_a_policy_whose_state_is_not_json_turns_speculation_off(capsys):
    chooser = DepthChooser(replace(FIXED, **chosen_by("Untellable", [3, 0, 1])))
    assert chooser.state() == "" and chooser.failed
    assert "Traceback" in capsys.readouterr().err


def test_a_policy_that_cannot_be_made_is_an_error_at_the_start():
    for policy in ("no.such.module:Name", "tests.support.depth_choosers:Nothing", "tests"):
        with pytest.raises(ConfigError, match="no module:class that can be imported"):
            DepthChooser(replace(SCRIPTED, policy=policy))


@pytest.mark.parametrize(("length", "steps"), [(1.0, 3), (1.5, 3), (3.0, 5), (4.0, 3)])
def test_simulated_drafts_are_kept_to_the_requested_length(length, steps):
    rate = kept_rate(length, steps)
    assert sum(rate**depth for depth in range(steps + 1)) == pytest.approx(length)
    settings = replace(FIXED, candidates=(0, 1, steps), fixed=0, simulated_accept_length=length)
    acceptance = SimulatedAcceptance(settings)
    batch, width = 20_000, steps + 1
    kept, predict = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch * width, dtype=torch.int32)
    drafts = torch.arange(batch * width).view(batch, width)
    index = acceptance.draw(torch.full((batch, width), -1, dtype=torch.int32), kept, predict, drafts)
    assert 1 + kept.float().mean() == pytest.approx(length, abs=0.03)
    assert ((index >= 0).sum(1) == kept + 1).all() and index.dtype == torch.int32
    assert (index[:, 0] == torch.arange(batch) * width).all() and index.max() < batch * width
    row = int(kept.argmax())
    count = int(kept[row])
    assert index[row, : count + 1].tolist() == list(range(row * width, row * width + count + 1))
    assert predict[row * width : row * width + count].tolist() == drafts[row, 1 : count + 1].tolist()


def test_without_drafts_or_a_length_verification_is_unchanged():
    real = torch.tensor([[0, -1], [2, 3]])
    nothing = torch.zeros(2)
    assert SimulatedAcceptance(FIXED).draw(real, nothing, nothing, torch.zeros(2, 2)) is real
    simulated = SimulatedAcceptance(replace(FIXED, simulated_accept_length=2.0))
    plain = torch.tensor([[0], [1]])
    assert simulated.draw(plain, nothing, nothing, torch.zeros(2, 1)) is plain
