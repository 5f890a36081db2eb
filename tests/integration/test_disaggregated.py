"""Engines on ranks of their own: whole runs that must be those of colocated engines, bit for bit.

Two ranks train, a third holds the engine. In float32, with seeded draws and one engine, nothing that differs between
the placements may reach a number: the same requests make the same batches on the same weights.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from unittest import mock

import pytest

from respec_trainer.config import load_config
from respec_trainer.telemetry.recorder import read_metrics
from tests.integration.ranks import run_ranks
from tests.tiny_runs import numbers, train

REPOSITORY = Path(__file__).parent.parent.parent
APART = ["rollout.placement=disaggregated", "rollout.engine_ranks=1", "rollout.engine.span=1"]
# An actor this young solves nothing, so no reward moves it; weight decay does.
SMALL = [
    "model.dtype=fp32", "run.device=cpu", "run.name=test", "telemetry.live='off'", "telemetry.samples_per_step=16",
    "telemetry.tensorboard=false", "data.prompts_per_step=4", "rollout.samples_per_prompt=4", "resync.verify=full",
    "rollout.sampling.max_new_tokens=16", "rollout.sampling.seeded=true", "actor.optim.weight_decay=10",
    "actor.optim.lr=0.01", "checkpoint.export_at_end=false", "drafter.weighting=uniform", "drafter.mode=sync",
    "drafter.batch_size=8", "checkpoint.every=1",
]  # fmt: skip


def take_part(config, deadly=0):
    """One rank's part in a run, as launch/train.py does it; the engine dies of its `deadly`th batch of requests."""
    from respec_trainer.compat import prepare

    prepare("cpu")
    from respec_trainer.placement import Placement
    from respec_trainer.rollout.engine_host import host_engine

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if Placement.of(config, world).trains(rank):
        return train(config)
    with dying_at(deadly):
        return host_engine(config, rank, world)


@contextlib.contextmanager
def dying_at(batch):
    from respec_trainer.rollout.sglang_engine import SGLangEngine

    submit, numbers = SGLangEngine.submit, itertools.count(1)

    def submit_and_kill(engine, requests):
        pending = submit(engine, requests)
        if next(numbers) == batch:
            for child in engine.process.children:
                child.kill()
        return pending

    with mock.patch.object(SGLangEngine, "submit", submit_and_kill):
        yield


@pytest.fixture
def run(small_actor, small_drafter, tmp_path):
    def run(ranks: int, name: str, *overrides: str, deadly: int = 0) -> tuple[list[dict], list[dict]]:
        """Metrics of every step, and its samples."""
        own = [f"model.path={small_actor}", f"data.path={small_actor}/data/train.jsonl"]
        own += [f"drafter.path={small_drafter}", f"run.dir={tmp_path / name}"]
        config = load_config(REPOSITORY / "configs/quickstart.yaml", [*SMALL, *own, *overrides])
        run_ranks(ranks, take_part, config, deadly, timeout=240)
        folder = tmp_path / name / "test"
        return read_metrics(folder), [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]

    return run


def test_the_run_is_that_of_colocated_engines(run):
    """Tensor parallel."""
    steps, samples = run(2, "together", "run.steps=2")
    apart_steps, apart_samples = run(3, "apart", *APART, "run.steps=2")
    assert len(steps) == 2 and {s["actor_version"] for s in samples} == {"actor-0", "actor-1"}
    assert apart_samples == samples
    assert numbers(apart_steps) == numbers(steps)


def test_so_is_one_that_is_taken_up_again_and_whose_engine_dies(run):
    """Data parallel. The first step's checkpoint begins the second, in which the engine dies after the canary."""
    shape = ["actor.parallel.tp=1"]
    steps, samples = run(2, "together", *shape, "run.steps=2")
    run(3, "apart", *shape, *APART, "run.steps=1")
    apart_steps, apart_samples = run(3, "apart", *shape, *APART, "run.steps=2", deadly=2)
    assert [step.pop("engine/restarts") for step in apart_steps] == [0, 1]
    assert [step.pop("engine/restarts") for step in steps] == [0, 0]
    for step in (*apart_steps, *steps):
        step.pop("resync/bytes")  # whole models are pushed again
        step.pop("engine/lost_tokens")
    assert apart_samples == samples
    assert numbers(apart_steps) == numbers(steps)
