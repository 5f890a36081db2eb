"""telemetry/trackers.py: every chosen tracker gets every step's metrics, and a wrong choice is an error."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from respec_trainer.errors import ConfigError
from respec_trainer.registry import Registry
from respec_trainer.telemetry import trackers
from respec_trainer.telemetry.recorder import Recorder, new_run_folder
from tests.support.configs import smallest_config
from tests.support.trackers import MemoryTracker

STEPS = [{"reward/mean": 0.5, "spec/accept_by_depth": [0.75, 0.25]}, {"reward/mean": 0.75}, {"reward/mean": 1.0}]


@pytest.fixture
def record(tmp_path):
    """Return a function that writes steps, from number `first`, into a run's folder, and returns the folder."""

    def record(names, steps=STEPS, first=0):
        config = smallest_config(tmp_path, f"run.dir={tmp_path / 'runs'}", f"telemetry.trackers={names}")
        folder = tmp_path / "runs/tiny"
        recorder = Recorder(folder if folder.exists() else new_run_folder(config), config)
        for step, metrics in enumerate(steps, first):
            recorder.step(step, metrics)
        recorder.close()
        return folder

    return record


@pytest.fixture
def with_memory(monkeypatch):
    """The registry with one more tracker."""
    known = {name: trackers.TRACKERS[name] for name in trackers.TRACKERS}
    registry = Registry(trackers.TRACKERS.key, known)
    registry.add("memory", MemoryTracker)
    monkeypatch.setattr(trackers, "TRACKERS", registry)
    monkeypatch.setattr(MemoryTracker, "made", [])


def scalars(folder):
    """The scalars that TensorBoard shows of a run: (step, value) pairs by name."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_new_tracker_sees_every_step_s_metrics(record, with_memory):
    folder = record("[jsonl, memory]")
    (tracker,) = MemoryTracker.made
    assert tracker.steps == list(enumerate(STEPS))
    assert (tracker.folder, tracker.run_name, tracker.closed) == (folder, "tiny", True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3, "the others got them too"


def test_jsonl_holds_an_object_a_step_and_goes_on_behind_the_last_one(record):
    record("[jsonl]", STEPS[:2])
    folder = record("[jsonl]", STEPS[2:], first=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, **metrics} for step, metrics in enumerate(STEPS)]
    assert not (folder / "tensorboard").exists(), "it was not chosen"


def test_tensorboard_shows_a_list_by_depth(record):
    assert scalars(record("[jsonl, tensorboard]")) == {
        "reward/mean": [(0, 0.5), (1, 0.75), (2, 1.0)],
        "spec/accept_by_depth_1": [(0, 0.75)],
        "spec/accept_by_depth_2": [(0, 0.25)],
    }


def test_tensorboard_removes_steps_that_a_resumed_run_does_again(record):
    record("[jsonl, tensorboard]")
    folder = record("[jsonl, tensorboard]", [{"reward/mean": 0.25}], first=1)
    assert scalars(folder)["reward/mean"] == [(0, 0.5), (1, 0.25)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("[jsonl, tensorbord]", "telemetry.trackers=tensorbord: .*did you mean 'tensorboard'"),
        ("[tensorboard]", r"telemetry.trackers=\[tensorboard\] has no jsonl: resuming a run.*add jsonl"),
        ("[]", r"telemetry.trackers=\[\] has no jsonl"),
        ("[jsonl, tensorboard, jsonl]", "jsonl is given twice"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_run_s_records_are_made(record, names, words):
    with pytest.raises(ConfigError, match=words):
        record(names)
