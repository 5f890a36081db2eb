"""The same seed and global batch give the same run on 1, 2 and 4 ranks, however they divide the work.

The runs use float32 and seeded draws. Layouts add in different orders, which changes a loss only by rounding, unless it
changes a draw: with a tiny vocabulary and a few hundred draws none changes, and the same tokens are trained.
"""

from __future__ import annotations

import json

import pytest

from respec_trainer.config_file import load_config
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.processes.ranks import run_ranks
from tests.support.tiny_runs import tiny_run, train

STEPS = 3
TOLERANCE = 1e-5  # of losses and norms of order 1 in float32
LAYOUTS = {
    "dp 2": (2, ["rollout.engine.span=2"]),
    "tp 2": (2, ["rollout.engine.span=2", "actor.parallel.tp=2"]),
    "dp 4": (4, ["rollout.engine.span=4"]),
    "tp 2 x dp 2": (4, ["rollout.engine.span=4", "actor.parallel.tp=2"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    _, path, *overrides = tiny_run(folder)
    # Only rewards that differ within a group change the actor; these depend on length and first letter.
    (folder / "reward.py").write_text(
        "def reward(text, answer):\n    return (len(text) + ord((text or 'a')[0])) % 5 / 4\n"
    )
    overrides += ["reward.kind=function", f"reward.function={folder / 'reward.py'}:reward", f"run.steps={STEPS}"]
    # Adam divides by a gradient's size: with a small eps, rounding would make steps where a gradient is nearly zero.
    overrides += ["actor.optim.eps=1e-3", "telemetry.samples_per_step=16", "rollout.samples_per_prompt=4"]
    # Two updates a step: each must have the same responses on any number of ranks.
    overrides += ["objective.minibatches=2"]
    # Long enough that some responses end early: with equal lengths advantages cancel, and the loss is 0.
    overrides += ["rollout.sampling.max_new_tokens=32"]

    def run(name: str, ranks: int, *layout: str) -> tuple[list[dict], list[dict]]:
        """Return the metrics of every step, and its samples."""
        config = load_config(path, [*overrides, f"run.name={name}", *layout])
        run_ranks(ranks, train, config, timeout=300)
        where = folder / "runs" / name
        return read_metrics(where), [json.loads(line) for line in (where / "samples.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def alone(run):
    return run("alone", 1, "rollout.engine.span=1", "actor.parallel.tp=1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_curve_is_that_of_one_rank(run, alone, layout):
    ranks, keys = LAYOUTS[layout]
    if "actor.parallel.tp=2" not in keys:
        keys = [*keys, "actor.parallel.tp=1"]
    steps, samples = run(layout.replace(" ", "_"), ranks, *keys)
    wanted, wanted_samples = alone
    assert [s["response"] for s in samples] == [s["response"] for s in wanted_samples]
    assert len(steps) == STEPS and any(abs(step["policy/loss"]) > 1e-3 for step in wanted)
    for name in ("policy/loss", "policy/entropy", "policy/kl", "policy/grad_norm", "reward/mean"):
        given = [step[name] for step in steps]
        assert given == pytest.approx([step[name] for step in wanted], abs=TOLERANCE, rel=TOLERANCE), name
