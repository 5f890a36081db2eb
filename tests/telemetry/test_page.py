"""report.html: drawn with and without decode logs, from a run's folder alone, by the run and by tools/report.py."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from respec_trainer.errors import DataError
from respec_trainer.telemetry.figures import PANELS, PHASES, run_figure
from respec_trainer.telemetry.page import write_page
from respec_trainer.telemetry.phase_figure import longest, phase_figure
from respec_trainer.telemetry.recorder import Recorder, new_run_folder
from respec_trainer.telemetry.timeline import Timeline
from tests.support.configs import smallest_config
from tests.support.telemetry import hand_log, hand_timeline, sample

IMAGE = re.compile(r'src="data:image/png;base64,([^"]+)"')
TOOL = str(Path(__file__).parents[2] / "tools/report.py")
STEP = {
    "reward/mean": 0.5,
    "rollout/tokens": 40,
    "rollout/tokens_per_second": 20.0,
    "spec/accept_length": 2.5,
    "time/generate": 2.0,
    "time/train": 1.0,
    "time/learn": 1.5,  # within generate
    "time/step": 3.5,
}
ADAPTED = {"spec/steps": 1.5, "spec/switches": 3, "spec/achieved_speedup": 1.25, "spec/predicted_speedup": 1.5}


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run; each step is a pair of metrics and timelines."""

    def run(*steps):
        config = smallest_config(tmp_path, f"run.dir={tmp_path / 'runs'}", "telemetry.trackers=[jsonl]")
        recorder = Recorder(new_run_folder(config), config)
        for step, (metrics, timelines) in enumerate(steps):
            recorder.rollout(step, [sample()] * 2, timelines)
            recorder.step(step, metrics)
        recorder.close()
        return recorder.folder

    return run


def images(page):
    found = [base64.b64decode(data) for data in IMAGE.findall(page)]
    assert all(image.startswith(b"\x89PNG") and len(image) > 10_000 for image in found)
    return len(found)


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def test_a_run_without_logs_is_drawn_over_its_steps(run):
    folder = run((STEP, ()), (STEP | {"reward/mean": 0.7}, ()))
    page = write_page(folder).read_text()
    assert images(page) == 1 and "Inside a rollout" not in page
    assert "2 iterations" in page and "80 response tokens" in page and "max_new_tokens: 8" in page
    assert "<td>reward</td><td>0.500</td><td>0.700</td><td>0.600</td>" in page
    assert "http" not in page, "everything is in the one file"


def test_a_run_with_logs_is_also_drawn_by_time(run):
    folder = run(*[(STEP | ADAPTED, [hand_timeline()])] * 5)
    page = write_page(folder).read_text()
    assert images(page) == 2
    assert "<td>speed-up over plain decoding</td><td>1.25</td>" in page


def test_a_rollout_that_only_read_prompts_is_left_out(run):
    only_prompts = hand_timeline(prefill=np.ones(6, bool))
    assert images(write_page(run((STEP, [only_prompts]))).read_text()) == 1
    assert images(write_page(run((STEP, [only_prompts]), (STEP, [only_prompts, hand_timeline()]))).read_text()) == 2


def test_a_depth_chooser_that_failed_is_named(run):
    folder = run((STEP | ADAPTED, ()), (STEP | ADAPTED | {"spec/chooser_failures": 1}, ()))
    assert "the depth chooser failed in iteration 2" in write_page(folder).read_text()


def test_the_run_figure_shows_what_the_run_has():
    assert titles(run_figure([STEP])) == ["reward", "rollout speed", "accept length", "time of an iteration"]
    every = [*(panel.title for panel in PANELS), "time of an iteration"]
    assert titles(run_figure([STEP | ADAPTED] * 30)) == every
    no_costs = {name: value for name, value in ADAPTED.items() if "speedup" not in name}
    assert titles(run_figure([STEP | no_costs])) == [name for name in every if "speed-up" not in name]


def test_the_time_split_adds_up():
    axes = run_figure([STEP] * 4).axes[3]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["generate 57%", "train 29%", "other 14%"] and "learn" not in PHASES
    tops = [stair.get_data().values for stair in axes.patches]
    assert tops[-1].tolist() == [3.5] * 4


def test_a_rollout_is_drawn_by_time_and_its_speedup_where_it_is_known():
    figure = phase_figure({1: [hand_timeline()], 7: [hand_timeline(), hand_timeline()]})
    assert titles(figure)[:2] == ["iteration 1", "iteration 7, the longest of 2 engines"] and len(figure.axes) == 8
    batch = figure.axes[0].lines[0]
    assert batch.get_xdata().tolist() == [1.0, 2.0, 5.5, 6.0, 6.5] and batch.get_ydata().tolist() == [4, 4, 2, 2, 2]
    unknown = Timeline.of(hand_log(predicted=np.zeros(6)), None)
    assert len(phase_figure({1: [unknown]}).axes) == 3


def test_of_several_engines_the_longest_is_shown():
    short, long = hand_timeline(), hand_timeline(start=np.array([0, 1, 2, 5, 5.5, 60]))
    assert longest([short, long]) is long


def test_a_folder_that_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(DataError, match="no metrics.jsonl in .*give the folder of a run"):
        write_page(tmp_path)
    with pytest.raises(DataError, match="no finished step yet"):
        write_page(run())


def test_the_tool_writes_to_the_path_it_is_given(run, tmp_path):
    folder = run((STEP, ()))
    command = [sys.executable, TOOL, str(folder), "--out", str(tmp_path / "a.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "a.html")
    assert images((tmp_path / "a.html").read_text()) == 1
    refused = subprocess.run([sys.executable, TOOL, str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("report: no metrics.jsonl in")


def test_drawing_leaves_the_start_of_a_run_alone():
    """matplotlib takes seconds to import: not before a figure is drawn."""
    code = "import sys, respec_trainer.telemetry.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
