"""telemetry/traces.py and the run's files of single steps: traces that load, whatever the engines did."""

from __future__ import annotations

import numpy as np
import pytest

from respec_trainer.errors import DataError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.speculation.simulation.trace import load_trace
from respec_trainer.telemetry.recorder import Recorder, new_run_folder, timeline_files
from respec_trainer.telemetry.timeline import Timeline, load_timelines
from respec_trainer.telemetry.traces import trace_rows
from tests.support.configs import smallest_config
from tests.support.telemetry import hand_timeline, sample


@pytest.fixture
def record(tmp_path):
    """Return a function that writes steps of a run with two samples a prompt, and returns its folder."""

    def record(steps, *overrides):
        config = smallest_config(tmp_path, f"run.dir={tmp_path / 'runs'}", "telemetry.trackers=[jsonl]", *overrides)
        recorder = Recorder(new_run_folder(config), config)
        for step, (samples, timelines) in enumerate(steps):
            recorder.rollout(step, samples, timelines)
        recorder.close()
        return recorder.folder

    return record


def group():
    """The samples of two prompts; the last has one token, drawn with its prompt, and so no verify pass."""
    drafted = [sample(tokens=tokens, verify=4, histogram=[1, 1, 0, 2]) for tokens in (12, 11, 9)]
    return [*drafted, sample(tokens=1)]


def test_fixed_steps_leave_each_response_its_own_histogram(record):
    trace = load_trace(record([(group(), ())]) / "lengths/step_1.jsonl")
    assert trace.length.tolist() == [12, 11, 9, 1] and trace.group.tolist() == [0, 0, 1, 1]
    assert trace.prompt.tolist() == [1] * 4
    assert trace.acceptance[0].tolist() == [3 / 4, 2 / 3, 1.0]
    assert trace.acceptance[3].tolist() == [3 / 4, 2 / 3, 1.0], "without a pass of its own: all the others'"


def test_where_no_draft_was_ever_kept_acceptance_is_zero(record):
    refused = [sample(tokens=3, verify=2, histogram=[2]), sample(tokens=1)]
    trace = load_trace(record([(refused, ())]) / "lengths/step_1.jsonl")
    assert trace.acceptance.tolist() == [[0.0]] * 2


def test_logged_steps_that_never_changed_do_the_same():
    fixed = hand_timeline(steps=np.array([0, 2, 2, 0, 2, 2]))
    assert trace_rows(group(), 2, [fixed]) == trace_rows(group(), 2)
    assert trace_rows(group(), 2)[0].accept_histogram == [1, 1, 0, 2]


def test_changing_steps_give_the_acceptance_of_the_phase(record):
    trace = load_trace(record([(group(), [hand_timeline()])]) / "lengths/step_1.jsonl")
    assert trace.acceptance.tolist() == [[7 / 8, 1 / 2]] * 4
    assert trace.length.tolist() == [12, 11, 9, 1]


def test_passes_without_drafts_give_no_acceptance(record):
    off = hand_timeline(steps=np.zeros(6, int), survivors=np.zeros((6, 0), int))
    counted_as_verified = [sample(tokens=5, verify=4, histogram=[4, 0, 0, 0])] * 2
    path = record([(counted_as_verified, [off])]) / "lengths/step_1.jsonl"
    with pytest.raises(DataError, match="give a default"):
        load_trace(path)
    assert load_trace(path, [0.5]).acceptance.tolist() == [[0.5]] * 2


def test_without_speculation_a_replay_needs_a_default(record):
    path = record([([sample(tokens=5)] * 2, ())]) / "lengths/step_1.jsonl"
    assert load_trace(path, [0.5]).length.tolist() == [5, 5]


def test_timelines_are_kept_only_where_engines_log(record):
    folder = record([(group(), ()), (group(), [Timeline.of(DecodeLog(), None)]), (group(), [hand_timeline()])])
    assert list(timeline_files(folder)) == [3]
    assert len(load_timelines(timeline_files(folder)[3])[0].log) == 6
    assert sorted(path.name for path in (folder / "lengths").iterdir()) == [f"step_{n}.jsonl" for n in (1, 2, 3)]


@pytest.mark.parametrize(("kept", "left"), [(0, [1, 2, 3, 4]), (2, [3, 4]), (4, [1, 2, 3, 4])])
def test_the_newest_steps_are_kept(record, kept, left):
    folder = record([(group(), [hand_timeline()])] * 4, f"telemetry.traces={kept}")
    assert list(timeline_files(folder)) == left
    assert sorted(path.stem for path in (folder / "lengths").iterdir()) == [f"step_{n}" for n in left]
