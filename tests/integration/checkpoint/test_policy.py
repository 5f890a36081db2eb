"""A resumed run chooses its draft steps as if it had never been interrupted: whole runs, one rank."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from respec_trainer.config_file import load_config
from respec_trainer.telemetry.recorder import read_metrics
from respec_trainer.telemetry.timeline import load_timelines
from tests.support.processes.ranks import run_ranks

REPOSITORY = Path(__file__).parents[3]
SMALL = [
    "model.dtype=fp32", "run.device=cpu", "run.name=test", "run.steps=2", "telemetry.live='off'",
    "telemetry.trackers=[jsonl]", "data.prompts_per_step=4", "rollout.samples_per_prompt=4", "actor.parallel.tp=1",
    "rollout.sampling.max_new_tokens=24", "rollout.sampling.seeded=true", "rollout.engine.max_running_requests=4",
    "rollout.engine.span=1", "checkpoint.every=1", "checkpoint.export_at_end=false", "drafter.weighting=none",
    "speculation.policy=adaptive", "speculation.profile=none.json", "speculation.topk=1", "speculation.steps=3",
    "speculation.draft_tokens=4",
]  # fmt: skip


def train(config) -> None:
    """Train like launch/train.py, but with costs of no real profile: without accepted drafts, drafting does not pay."""
    from respec_trainer.compat import prepare

    prepare("cpu")
    from respec_trainer import job as module
    from respec_trainer.speculation.profiling.settings import adaptive_settings
    from respec_trainer.trainer import Trainer
    from tests.support.speculation import CPU

    steps = adaptive_settings(CPU, (0, 1, 3), max_batch=4, max_context=256, explore=0.05)
    before, module.depth_settings = module.depth_settings, lambda *_: steps
    try:
        job = module.Job(config)
        Trainer(job).run()
        job.actor.engine.destroy()
        job.close()
    finally:
        module.depth_settings = before
    del job
    gc.collect()  # the process continues, and its next run must not find objects of this one


@pytest.fixture(scope="module")
def run(small_actor, small_drafter, tmp_path_factory):
    def run(name: str, *overrides: str) -> Path:
        """Return the run's folder."""
        own = [f"model.path={small_actor}", f"data.path={small_actor}/data/train.jsonl"]
        own += [f"drafter.path={small_drafter}", f"run.dir={root / name}"]
        config = load_config(REPOSITORY / "configs/quickstart.yaml", [*SMALL, *own, *overrides])
        run_ranks(1, train, config, timeout=240)
        return root / name / "test"

    root = tmp_path_factory.mktemp("policy")
    return run


def numbers(folder: Path) -> dict:
    """Return the metrics of the last step that do not depend on a clock; shares in `spec/*` are shares of time."""
    groups = ("reward/", "policy/", "mismatch/", "rollout/", "spec/accept")
    return {k: v for k, v in read_metrics(folder)[-1].items() if k.startswith(groups) and "per_second" not in k}


def test_an_adaptive_run_taken_up_again_is_the_uninterrupted_one(run):
    whole = run("whole")
    resumed = run("resumed", f"checkpoint.resume={whole}/checkpoints/step_1")
    assert [step["step"] for step in read_metrics(resumed)] == [0, 1]
    (first,), (second,) = (load_timelines(folder / "decode/step_2.npz") for folder in (whole, resumed))
    for column in ("prefill", "batch", "steps", "survivors", "predicted"):
        assert getattr(first.log, column).tolist() == getattr(second.log, column).tolist(), column
    assert first.log.steps.any() and not first.log.steps[:4].any(), "it has learnt that drafts are not kept"
    assert numbers(resumed) == numbers(whole)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
