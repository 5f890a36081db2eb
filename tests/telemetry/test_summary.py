"""telemetry/summary.py: what the last lines of a run say of all its steps, not of the last one."""

from __future__ import annotations

import io

from rich.console import Console

from respec_trainer.telemetry.summary import LOSSY, curve, mismatch, print_summary, speculation_lines

STEP = {
    "reward/mean": 0.5,
    "rollout/tokens": 100,
    "time/generate": 1.0,
    "time/step": 2.0,
    "spec/accept_length": 3.0,
}


def printed(steps: list[dict]) -> str:
    text = io.StringIO()
    print_summary(steps, "runs/x", Console(file=text, width=200))
    return text.getvalue()


def test_the_largest_mismatch_may_be_of_any_step():
    assert mismatch([{"mismatch/kl": kl} for kl in (1e-4, 5e-4, 3e-4)]) == "0.0003, at most 0.0005 in a step"
    assert mismatch([{}]) == "not measured"


def test_a_long_curve_shows_the_means_of_its_parts():
    """Each pair is a low and a high value, so every mean is the same but for the last."""
    assert curve([0.0, 2.0] * 3 + [2.0, 4.0], width=4) == "▁▁▁█"
    assert curve([0.0, 4.0, 2.0, 2.0], width=2) == "▁▁"


def test_restarts_and_lost_tokens_are_of_the_whole_run():
    quiet = STEP | {"engine/restarts": 0, "engine/lost_tokens": 0}
    text = printed([STEP | {"engine/restarts": 2, "engine/lost_tokens": 1500}, quiet, STEP | quiet])
    assert "restarts      2 of rollout engines; 1,500 tokens drawn again" in text
    assert "restarts" not in printed([quiet] * 2) and "restarts" not in printed([STEP])


def test_one_lossy_step_marks_the_run():
    assert LOSSY in printed([STEP | {"spec/lossy": 0}, STEP | {"spec/lossy": 1}, STEP | {"spec/lossy": 0}])
    assert LOSSY not in printed([STEP | {"spec/lossy": 0}])


def test_numbers_of_the_whole_run():
    text = printed([STEP, STEP | {"rollout/tokens": 300, "time/generate": 3.0, "spec/accept_length": 2.0}])
    assert "100 tokens/s over 400 tokens; 100% of the time" in text and "accept length 2.50" in text
    assert "4 s for 2 steps" in text and "No step was completed" in printed([])


def test_a_failed_chooser_is_named_by_its_first_step():
    steps = [STEP, STEP | {"spec/chooser_failures": 1}, STEP | {"spec/chooser_failures": 3}]
    (line,) = speculation_lines(steps)
    assert line.endswith("the depth chooser failed in step 2")
