"""Engines on ranks of their own: whole runs whose results equal those of colocated engines, bit for bit.

Two ranks train, a third runs the engine. With float32, seeded draws and one engine, no result may depend on the
placement: the same requests make the same batches on the same weights.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest

from respec_trainer.config_file import load_config
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.processes.ranks import run_ranks
from tests.support.tiny_runs import numbers, train

REPOSITORY = Path(__file__).parents[4]
APART = ["rollout.placement=disaggregated", "rollout.engine_ranks=1", "rollout.engine.span=1"]
KILLED_AT = 4  # the fourth batch of an engine, after the canary's, the first step's and the canary's: the second step's
# This untrained actor solves nothing, so rewards do not change it; weight decay does.
SMALL = [
    "model.dtype=fp32", "run.device=cpu", "run.name=test", "telemetry.live='off'", "telemetry.samples_per_step=16",
    "telemetry.trackers=[jsonl]", "data.prompts_per_step=4", "rollout.samples_per_prompt=4", "resync.verify=full",
    "rollout.sampling.max_new_tokens=16", "rollout.sampling.seeded=true", "actor.optim.weight_decay=10",
    "actor.optim.lr=0.01", "checkpoint.export_at_end=false", "drafter.weighting=uniform", "drafter.mode=sync",
    "drafter.batch_size=8", "checkpoint.every=1",
]  # fmt: skip


def take_part(config, deadly=0):
    """Run one rank as launch/train.py does; the engine dies at its `deadly`th batch of requests."""
    from respec_trainer.compat import prepare

    prepare("cpu")
    from respec_trainer.placement import Placement
    from respec_trainer.rollout.remote.host import host_engine

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if Placement.of(config, world).trains(rank):
        return train(config)
    with dying_at(deadly):
        return host_engine(config, rank, world)


def train_beside(config, words, grave):
    """Run a training rank. The first one starts the last rank, an engine's host, as an operator does, and ends it."""
    from respec_trainer.compat import prepare

    prepare("cpu")
    from respec_trainer.watchdog import Watchdog

    rank, trainers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with mock.patch.dict(os.environ, WORLD_SIZE=str(trainers + 1)), contextlib.ExitStack() as stack:
        host = stack.enter_context(supervised_host(words, grave)) if rank == 0 else None
        watchdog = Watchdog(config.run, rank, trainers + 1, trainers)
        watchdog.start()
        train(config, watchdog)
        return host and (host.wait(60), host.stderr.read())


@contextlib.contextmanager
def supervised_host(words, grave):
    rank_variables = {"RANK": str(int(os.environ["WORLD_SIZE"]) - 1), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    command = [sys.executable, str(REPOSITORY / "launch/supervise.py"), "--backoff", "0.1", "--", sys.executable]
    command += [str(REPOSITORY / "tests/support/processes/mortal_host.py"), str(grave), str(KILLED_AT), *words]
    host = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | rank_variables)
    try:
        yield host
    finally:
        if host.poll() is None:
            host.send_signal(signal.SIGTERM)  # it ends its command
            host.wait()


@contextlib.contextmanager
def dying_at(batch):
    from respec_trainer.rollout.sglang.engine import SGLangEngine

    submit, numbers = SGLangEngine.submit, itertools.count(1)

    def submit_and_kill(engine, requests):
        pending = submit(engine, requests)
        if next(numbers) == batch:
            for child in engine.process.children:
                child.kill()
        return pending

    with mock.patch.object(SGLangEngine, "submit", submit_and_kill):
        yield


@pytest.fixture(scope="module")
def words(small_actor, small_drafter):
    """A function that returns the arguments of launch/train.py for a run in a folder."""

    def words(folder: Path, *overrides: str) -> list[str]:
        own = [f"model.path={small_actor}", f"data.path={small_actor}/data/train.jsonl"]
        own += [f"drafter.path={small_drafter}", f"run.dir={folder}"]
        return ["--config", str(REPOSITORY / "configs/quickstart.yaml"), *SMALL, *own, *overrides]

    return words


def outcome(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return the metrics of every step of a run, and its samples."""
    lines = (folder / "test/samples.jsonl").read_text().splitlines()
    return read_metrics(folder / "test"), [json.loads(line) for line in lines]


@pytest.fixture
def run(words, tmp_path):
    def run(ranks: int, name: str, *overrides: str, deadly: int = 0) -> tuple[list[dict], list[dict]]:
        _, config, *changes = words(tmp_path / name, *overrides)
        run_ranks(ranks, take_part, load_config(config, changes), deadly, timeout=240)
        return outcome(tmp_path / name)

    return run


@pytest.fixture(scope="module")
def together(words, tmp_path_factory):
    """The outcome of two steps with colocated engines, tensor parallel."""
    folder = tmp_path_factory.mktemp("together")
    _, config, *changes = words(folder, "run.steps=2")
    run_ranks(2, take_part, load_config(config, changes), timeout=240)
    return outcome(folder)


def test_the_run_equals_that_of_colocated_engines(run, together):
    """The actor is tensor parallel."""
    steps, samples = together
    apart_steps, apart_samples = run(3, "apart", *APART, "run.steps=2")
    assert len(steps) == 2 and {s["actor_version"] for s in samples} == {"actor-0", "actor-1"}
    assert apart_samples == samples
    assert numbers(apart_steps) == numbers(steps)


@pytest.mark.long
def test_a_resumed_run_whose_engine_dies_does_too(run):
    """The actor is data parallel. The second step resumes from the first one's checkpoint; then the engine dies."""
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


@pytest.mark.long
def test_a_run_whose_engine_host_is_killed_and_restarted_does_too(words, together, tmp_path):
    """The actor is tensor parallel. The host dies in the second step's rollout, and its supervisor restarts it."""
    arguments = words(tmp_path, *APART, "run.steps=2", "rollout.engine.timeout=200")
    config, record = load_config(arguments[1], arguments[2:]), tmp_path / "record"
    (code, output), _ = run_ranks(2, train_beside, config, arguments, record, timeout=240)
    killed, answered, requests = map(int, record.read_text().split())
    assert answered < requests == 16 and not psutil.pid_exists(killed), "it died during the rollout"
    assert code == 0 and output.count("exit code -9; restart 1 of") == 1 and "error: " not in output, output
    (steps, samples), (calm_steps, calm_samples) = outcome(tmp_path), together
    assert samples == calm_samples
    assert [step["engine/restarts"] for step in steps] == [0, 1]
    differ = {"engine/restarts", "resync/bytes"}  # whole models are pushed to the restarted host
    assert [{k: v for k, v in step.items() if k not in differ} for step in numbers(steps)] == [
        {k: v for k, v in step.items() if k not in differ} for step in numbers(calm_steps)
    ]
