"""telemetry/metrics.py: the metrics of the engines' logs, against values computed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from respec_trainer.config import SpeculationConfig
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.telemetry.metrics import speculation_metrics, step_metrics
from respec_trainer.telemetry.timeline import Timeline
from tests.support.telemetry import hand_log, hand_timeline, sample


def test_metrics_are_by_decode_time():
    metrics = step_metrics([hand_timeline()])  # batches of 1, 3, 0.5 and 0.5 s
    assert metrics.pop("spec/accept_by_depth") == [7 / 8, 1 / 2]
    assert metrics == pytest.approx(
        {
            "spec/steps": (2 * 1.0 + 0 * 3.0 + 1 * 0.5 + 1 * 0.5) / 5,
            "spec/off_fraction": 3 / 5,
            "spec/switches": 2,
            "spec/chooser_failures": 0,
            "spec/decide_us": 15.0,
            "spec/catch_up_share": 0.25 / 5,
            "spec/predicted_speedup": (1.5 * 1.0 + 1.0 * 3.0 + 2.0 * 0.5) / 4.5,
            "spec/achieved_speedup": (1.25 + 0.5 + 0.6 + 0.8) / 5,
        }
    )
    assert json.loads(json.dumps(metrics)) == metrics, "plain numbers, as metrics.jsonl takes them"


def test_right_predictions_are_what_is_achieved():
    line = hand_timeline()
    right = np.where(line.decodes, line.earned / line.seconds, 0.0)
    metrics = step_metrics([hand_timeline(predicted=right)])
    assert metrics["spec/predicted_speedup"] == pytest.approx(metrics["spec/achieved_speedup"])


def test_several_engines_count_by_their_time():
    slow = hand_timeline(start=np.array([0, 1, 2, 5, 5.5, 6]) * 2.0, steps=np.zeros(6, int))
    both = step_metrics([hand_timeline(), slow])
    # The slow one's batches last 2, 6, 1 and 0.5 s, all without speculation.
    assert both["spec/off_fraction"] == pytest.approx((3 + 9.5) / (5 + 9.5))
    assert both["spec/accept_by_depth"] == [7 / 8, 1 / 2]


def test_without_costs_or_predictions_there_are_no_speedups():
    metrics = step_metrics([Timeline.of(hand_log(predicted=np.zeros(6)), None)])
    assert metrics["spec/off_fraction"] == 0.6
    assert not [name for name in metrics if "speedup" in name]


def test_failures_of_the_depth_chooser_are_summed_even_where_nothing_was_logged():
    failed = Timeline.of(DecodeLog(failures=2), None)
    assert step_metrics([failed]) == {"spec/chooser_failures": 2}
    assert step_metrics([failed, hand_timeline(failures=1)])["spec/chooser_failures"] == 3


def test_engines_that_log_nothing_leave_the_samples_metrics_alone():
    samples = [sample(tokens=12, verify=4, histogram=[1, 1, 0, 2])]
    plain = speculation_metrics(samples, SpeculationConfig())
    assert speculation_metrics(samples, SpeculationConfig(), [Timeline.of(DecodeLog(), None)]) == plain
    logged = speculation_metrics(samples, SpeculationConfig(), [hand_timeline()])
    assert logged["spec/accept_length"] == plain["spec/accept_length"] == 2.75
    assert (plain["spec/off_fraction"], logged["spec/off_fraction"]) == (0.0, 0.6)
    assert (plain["spec/steps"], logged["spec/steps"]) == (3, pytest.approx(0.6))
