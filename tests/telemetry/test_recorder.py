"""telemetry/: metrics that follow from samples, the clock, the run's folder, the display and the summary."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from respec_trainer.config import SamplingConfig, SpeculationConfig
from respec_trainer.config_file import load_config
from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED
from respec_trainer.telemetry.live import Progress
from respec_trainer.telemetry.metrics import reward_metrics, rollout_metrics, speculation_metrics
from respec_trainer.telemetry.phases import PhaseClock
from respec_trainer.telemetry.recorder import Recorder, new_run_folder, read_metrics
from respec_trainer.telemetry.summary import LOSSY, curve, print_summary, reward_rise
from tests.support.configs import smallest_config
from tests.support.telemetry import sample


@pytest.fixture
def config(tmp_path):
    return smallest_config(tmp_path, f"run.dir={tmp_path / 'runs'}")


def test_reward_metrics():
    metrics = reward_metrics([sample(1.0), sample(0.0), sample(0.0), sample(1.0)])
    assert metrics == {"reward/mean": 0.5, "reward/std": 0.5, "reward/solve_rate": 0.5}


def test_reward_metrics_of_named_parts():
    samples = [sample(0.3), sample(0.3), sample(0.0), sample(1.0)]
    samples[0].reward_parts = {"correct": 0.0, "format": 1.0}  # the reward of a right format does not count as solved
    samples[1].reward_parts = {"correct": 1.0, "format": 0.5}
    metrics = reward_metrics(samples)
    assert metrics["reward/solve_rate"] == 0.5 and metrics["reward/mean"] == pytest.approx(0.4)
    assert metrics["reward/parts/correct"] == 0.5 and metrics["reward/parts/format"] == 0.75


def test_reward_metrics_are_of_the_samples_that_were_scored():
    metrics = reward_metrics([sample(1.0), sample(None), sample(0.0), sample(None)])
    assert metrics == {"reward/mean": 0.5, "reward/std": 0.5, "reward/solve_rate": 0.5, "reward/skipped": 2}
    assert reward_metrics([sample(None)] * 3) == {"reward/skipped": 3}


def test_rollout_metrics():
    samples, whole = [sample(tokens=4), sample(tokens=8, finish="length")], SamplingConfig(max_new_tokens=8)
    metrics = rollout_metrics(samples, 2.0, whole)
    assert metrics["rollout/tokens"] == 12
    assert metrics["rollout/tokens_per_second"] == 6.0
    assert metrics["rollout/response_length"] == 6.0
    assert metrics["rollout/truncated"] == 0.5
    sampling = [{}, {"top_p": 0.9}, {"allow_untruncated": True}, {"top_k": 2, "allow_untruncated": True}]
    marks = [rollout_metrics(samples, 2.0, SamplingConfig(max_new_tokens=8, **each)) for each in sampling]
    assert [each["rollout/untruncated"] for each in marks] == [0, 0, 0, 1]


def test_speculation_metrics_count_the_bonus_token():
    # 10 passes: 2 accepted nothing, 3 one draft, 1 two, 4 three: 17 drafts, so 27 tokens in 10 passes.
    first = sample(tokens=1 + 11, verify=4, histogram=[1, 1, 0, 2])
    second = sample(tokens=1 + 16, verify=6, histogram=[1, 2, 1, 2])
    metrics = speculation_metrics([first, second], SpeculationConfig())
    assert metrics["spec/accept_length"] == pytest.approx(2.7)
    assert metrics["spec/accept_by_depth"] == pytest.approx([8 / 10, 5 / 8, 4 / 5])
    assert metrics["spec/off_fraction"] == 0.0
    assert first.accept_length == pytest.approx(1 + 7 / 4)


@pytest.mark.parametrize("tokens", range(9, 13))
def test_what_lies_behind_a_response_s_end_is_not_gained(tokens):
    """The last of four passes accepted three drafts and drew one more; the response ends at one of these tokens."""
    cut = sample(tokens=tokens, verify=4, histogram=[1, 1, 0, 2])
    whole = sample(tokens=1 + 16, verify=6, histogram=[1, 2, 1, 2])
    assert cut.accept_length == (tokens - 1) / 4
    metrics = speculation_metrics([cut, whole], SpeculationConfig())
    assert metrics["spec/accept_length"] == pytest.approx((tokens - 1 + 16) / 10)
    assert metrics["spec/accept_by_depth"] == pytest.approx([8 / 10, 5 / 8, 4 / 5]), "of all drafts that were verified"


def test_tokens_without_a_draft_are_counted_as_off_but_for_a_response_s_first():
    samples = [sample(verify=4, histogram=[1, 1, 0, 2]), sample(tokens=1), sample(tokens=3)]
    samples[0].origins = [UNDRAFTED, ACCEPTED, BONUS, UNDRAFTED]
    assert speculation_metrics(samples, SpeculationConfig())["spec/off_fraction"] == 3 / 5


def test_lossy_speculation_is_marked():
    lossy = SpeculationConfig(accept_threshold_acc=0.9, allow_lossy=True)
    assert [speculation_metrics([sample()], s)["spec/lossy"] for s in (lossy, SpeculationConfig())] == [1, 0]


def test_speculation_metrics_without_speculation():
    metrics = speculation_metrics([sample(), sample()], SpeculationConfig())
    assert metrics["spec/accept_length"] == 1.0
    assert metrics["spec/off_fraction"] == 1.0
    assert metrics["spec/steps"] == 0


def test_clock_adds_up_phases_and_starts_anew():
    phases = []
    clock = PhaseClock(phases.append)
    for _ in range(2):
        with clock("generate"):
            time.sleep(0.01)
    times = clock.take()
    assert phases == ["generate", "generate"]
    assert 0.02 <= times["time/generate"] <= times["time/step"]
    assert set(clock.take()) == {"time/step"}


def test_a_phase_goes_on_when_one_inside_it_has_ended():
    phases = []
    clock = PhaseClock(phases.append)
    with clock("generate"), clock("learn"):
        pass
    assert phases == ["generate", "learn", "generate"]


def test_run_folder_is_never_shared(config):
    folders = [new_run_folder(config) for _ in range(3)]
    assert [f.name for f in folders] == ["tiny", "tiny-2", "tiny-3"]


def test_recorder_writes_what_it_is_given(config):
    folder = new_run_folder(config)
    recorder = Recorder(folder, config)
    recorder.step(0, {"reward/mean": 0.5, "spec/accept_by_depth": [0.9, 0.8]})
    recorder.step(1, {"reward/mean": 0.75})
    recorder.samples(0, [sample(1.0), sample(), sample()], [("p", "r")] * 3)
    parts = sample(0.5)
    parts.reward_parts = {"format": 0.5}
    recorder.samples(1, [parts, sample(None)], [("p", "r")] * 2)
    recorder.close()
    assert [row["reward/mean"] for row in read_metrics(folder)] == [0.5, 0.75]
    assert [row["step"] for row in read_metrics(folder)] == [0, 1]
    kept = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [0] * config.telemetry.samples_per_step + [1, 1]
    assert kept[0]["reward"] == 1.0 and kept[0]["response"] == "r"
    assert [row.get("reward_parts") for row in kept] == [None, None, {"format": 0.5}, None]
    assert [(row["reward"], row.get("skipped")) for row in kept[2:]] == [(0.5, None), (None, True)]
    assert load_config(folder / "config.yaml") == config
    assert any((folder / "tensorboard").iterdir())


def steps(rewards):
    return [
        {
            "reward/mean": reward,
            "rollout/tokens": 100,
            "time/generate": 1.0,
            "time/step": 2.0,
            "spec/accept_length": 3.0,
            "rollout/tokens_per_second": 100.0,
        }
        for reward in rewards
    ]


def test_curve_keeps_shape_and_width():
    assert curve([0, 1, 2, 3]) == "▁▃▆█"
    assert len(curve([i / 7 for i in range(500)], width=60)) == 60
    assert curve([0.5, 0.5]) == "▁▁"


def test_the_summary_leaves_out_steps_of_which_nothing_was_scored():
    skipped = {name: value for name, value in steps([0.5])[0].items() if name != "reward/mean"}
    assert reward_rise([*steps([0.25]), skipped, *steps([0.75])]) == (0.25, 0.75)
    for run, words in (([*steps([0.25]), skipped, *steps([0.75])], "0.250 -> 0.750"), ([skipped], "nan -> nan")):
        console = Console(file=io.StringIO(), width=100)
        print_summary(run, "runs/x", console)
        assert words in console.file.getvalue()


def test_reward_rise_averages_the_ends():
    assert reward_rise(steps([0.0] * 5 + [0.5] * 3 + [1.0] * 5)) == (0.0, 1.0)
    assert reward_rise(steps([0.25])) == (0.25, 0.25)


def test_summary_reports_the_divergence_of_sampler_and_actor(tmp_path):
    text, run = io.StringIO(), steps([0.2] * 3)
    run[0]["mismatch/kl"], run[2]["mismatch/kl"] = 1e-4, 3e-4  # the second step was refused
    print_summary(run, tmp_path, Console(file=text, width=200))
    assert "mismatch kl   0.0002, at most 0.0003 in a step" in text.getvalue()


def test_summary_reports_reward_speed_and_folder(tmp_path):
    text = io.StringIO()
    print_summary(steps([0.2] * 5 + [0.6] * 5), tmp_path, Console(file=text, width=200))
    for words in ("0.200 -> 0.600", "+0.400", "100 tokens/s", "3.00", "20 s for 10 steps", str(tmp_path)):
        assert words in text.getvalue()


def test_summary_warns_that_samples_did_not_follow_the_policy(tmp_path):
    texts = []
    for lossy in (0, 1):
        text = io.StringIO()
        rows = [row | {"spec/lossy": lossy} for row in steps([0.5, 0.5])]
        print_summary(rows, tmp_path, Console(file=text, width=200))
        texts.append(text.getvalue())
    assert [LOSSY in text for text in texts] == [False, True]


def test_summary_reports_the_speedup_weighted_by_time(tmp_path):
    text, run = io.StringIO(), steps([0.2] * 3)
    run[0] |= {"spec/achieved_speedup": 1.0, "spec/predicted_speedup": 1.1, "spec/off_fraction": 1.0}
    run[1] |= {"spec/achieved_speedup": 2.0, "spec/predicted_speedup": 1.9, "spec/off_fraction": 0.0}
    run[1]["time/generate"] = 3.0
    print_summary(run, tmp_path, Console(file=text, width=200))
    assert "speculation   1.75x plain decoding, predicted 1.70x; off 25% of the time" in text.getvalue()


@pytest.mark.parametrize("failures", [0, 2])
def test_summary_warns_that_the_depth_chooser_failed(tmp_path, failures):
    text, run = io.StringIO(), steps([0.2] * 3)
    run[1]["spec/chooser_failures"] = failures
    print_summary(run, tmp_path, Console(file=text, width=200))
    assert ("speculation was turned off: the depth chooser failed in step 2" in text.getvalue()) == bool(failures)
    assert "plain decoding" not in text.getvalue(), "no costs, no speed-up"


@pytest.fixture
def lone_report(tmp_path, monkeypatch):
    """A run's Report in a process without others."""
    from respec_trainer.telemetry import report

    monkeypatch.setattr(report.dist, "broadcast_object_list", lambda *_args, **_kwargs: None)

    def make(*overrides):
        shape = ["telemetry.live=lines", "telemetry.trackers=[jsonl]", f"run.dir={tmp_path}", *overrides]
        return report.Report(smallest_config(tmp_path, *shape), rank=0, control=None)

    return make


@pytest.mark.parametrize("lossy", [True, False])
def test_a_run_warns_at_its_start_that_samples_will_not_follow_the_policy(lone_report, capsys, lossy):
    thresholds = ["speculation.accept_threshold_single=0.5", "speculation.allow_lossy=true"] * lossy
    lone_report("speculation.algorithm=ngram", *thresholds).close()
    assert (LOSSY in capsys.readouterr().out) == lossy


def test_a_run_ends_with_its_page(lone_report):
    report = lone_report()
    for step, row in enumerate(steps([0.25, 0.75])):
        report.rollout(step, [sample()] * 8, [])
        report.step(step, row)
    report.summary()
    report.close()
    assert "data:image/png" in (report.folder / "report.html").read_text()
    assert len(list((report.folder / "lengths").iterdir())) == 2


def test_a_page_that_cannot_be_drawn_does_not_fail_the_run(lone_report, capsys):
    report = lone_report()
    report.step(0, steps([0.5])[0])
    (report.folder / "decode").mkdir()
    (report.folder / "decode/step_1.npz").write_bytes(b"broken")
    report.summary()
    report.close()
    output = capsys.readouterr().out
    assert "report.html was not written (DataError:" in output and f"tools/report.py {report.folder}" in output
    assert "summary" in output


def test_a_run_without_a_step_has_no_page(lone_report, capsys):
    report = lone_report()
    report.summary()
    report.close()
    assert not (report.folder / "report.html").exists()
    assert "not written" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["lines", "panel", "off"])
def test_progress_shows_steps_unless_off(mode):
    text = io.StringIO()
    with Progress(2, mode, Console(file=text, width=200, force_terminal=mode == "panel")) as progress:
        progress.phase("starting the rollout engine")
        for step, row in enumerate(steps([0.125, 0.875])):
            progress.step(step, row)
    assert ("0.125" in text.getvalue()) == (mode != "off")
