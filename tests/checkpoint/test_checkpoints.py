"""Checkpoints: a run resumes as if it had not stopped, after any kind of stop; a run that cannot resume is refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from respec_trainer.checkpoint.store import checkpoints_in, latest, step_of
from respec_trainer.errors import CheckpointError, ConfigError
from tests.support.checkpoints import KINDS, ToyRun, damage, toy_config
from tests.support.disks import full_disk


def steps(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints_in(run / "checkpoints")]


def start(tmp_path: Path, changes: dict | None = None, name: str = "run") -> ToyRun:
    return ToyRun(tmp_path / name, toy_config(tmp_path, changes))


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    whole = start(tmp_path, name="whole")
    whole.work(6)
    first = start(tmp_path, {"checkpoint.every": 2})
    first.work(5)
    first.checkpoints.wait()
    again = start(tmp_path, {"checkpoint.every": 2})
    assert (again.done, again.shared.value, again.own.value, again.actor.updates) == (4, 6, 9, 4)
    again.work(2)
    assert again.metrics() == whole.metrics()
    assert all(torch.equal(again.actor.values[kind], whole.actor.values[kind]) for kind in KINDS)
    assert "resumed after step 4" in again.said[0]


def test_a_checkpoint_holds_what_the_format_says(tmp_path):
    run = start(tmp_path, {"checkpoint.background": False})
    run.work(1)
    folder = run.folder / "checkpoints/step_1"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "meta.json",
        "state.json",
        "config.yaml",
        "actor/tp0_dp0.safetensors",
        "ranks/rank0.safetensors",
        "drafter/config.json",
        "hf/config.json",
        "hf/tokenizer.json",
    }
    meta = json.loads((folder / "meta.json").read_text())
    assert set(meta["files"]) == files - {"meta.json"}
    assert (meta["format"], meta["step"], meta["tp"], meta["model"]["model_type"]) == (2, 1, 1, "llama")
    assert (folder / "drafter/config.json").read_text() == "as of update 1"


def test_when_it_saves(tmp_path):
    run = start(tmp_path, {"checkpoint.every": 3, "run.steps": 8})
    assert [done for done in range(1, 9) if run.checkpoints.due(done)] == [3, 6, 8]
    never = start(tmp_path, {"checkpoint.every": 0}, name="never")
    assert not any(never.checkpoints.due(done) for done in range(1, 101))


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = start(tmp_path, {"checkpoint.keep": 1, "checkpoint.keep_best": 1, "checkpoint.best_metric": "score"})
    for done, score in ((1, 0.3), (2, 0.9), (3, float("nan")), (4, 0.1)):
        run.checkpoints.save(done, run.parts, {"score": score})
    run.checkpoints.wait()
    assert steps(run.folder) == [4, 2]


def test_the_newest_valid_one_is_taken_and_the_others_are_moved_aside(tmp_path):
    run = start(tmp_path, {"checkpoint.keep": 4})
    run.work(4)
    run.checkpoints.wait()
    root = run.folder / "checkpoints"
    damage(root / "step_4/actor/tp0_dp0.safetensors")
    (root / "step_3/meta.json").unlink()
    again = start(tmp_path, {"checkpoint.keep": 4})
    assert again.done == 2
    assert [line["step"] for line in again.metrics()] == [1, 2]
    said = "\n".join(again.said)
    assert "step_4 is skipped: " in said
    assert "tp0_dp0.safetensors is corrupted: its XXH3-128 is " in said
    assert "step_3 is skipped: " in said
    assert "has no meta.json" in said
    assert "moved to " in said
    again.work(2)
    again.checkpoints.wait()
    assert steps(run.folder) == [4, 3, 2, 1]
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4]
    assert (root / "step_4.damaged-1/meta.json").is_file()


def test_where_none_is_valid_nothing_begins_anew_in_silence(tmp_path):
    run = start(tmp_path)
    run.work(1)
    run.checkpoints.wait()
    damage(run.folder / "checkpoints/step_1/ranks/rank0.safetensors")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is valid: .*rank0\.safetensors is corrupted"):
        start(tmp_path)
    assert start(tmp_path, {"checkpoint.resume": "never"}, name="new").done == 0


@pytest.mark.parametrize("name", ["tp0_dp0.safetensors", "rank0.safetensors"])
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(tmp_path, name):
    run = start(tmp_path)
    run.work(1)
    run.checkpoints.wait()
    with full_disk(lambda path: path.name == name):
        run.work(1)
        with pytest.raises(CheckpointError, match=rf"step 2 failed: rank 0: .*{name}: No space left on device"):
            run.work(1)
    assert "No space left on device" in run.said[-1]
    assert steps(run.folder) == [1]
    assert latest(run.folder / "checkpoints").name == "step_1"
    assert not list((run.folder / "checkpoints").glob(".*"))
    assert start(tmp_path).done == 1


def test_a_disk_that_is_full_before_anything_is_written_is_reported_too(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step_1")

    run = start(tmp_path)
    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(CheckpointError, match="step_1: No space left on device"):
        run.work(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.seed": 1}, "run.seed 0 -> 1"),
        ({"actor.optim.lr": 0.5, "run.name": "b"}, r"configuration: actor.optim.lr 1e-06 -> 0.5\. Set"),
        ({"data.prompts_per_step": 4}, "data.prompts_per_step 2 -> 4"),
    ],
)
def test_another_configuration_is_refused_by_its_keys(tmp_path, changes, message):
    run = start(tmp_path)
    run.work(1)
    run.checkpoints.wait()
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, changes)
    again = start(tmp_path, {"run.name": "b", "run.steps": 7, "actor.zero.stage": 3, "resync.verify": "off"})
    assert again.done == 1


def test_another_model_is_refused_by_its_keys(tmp_path):
    run = start(tmp_path)
    run.work(1)
    run.checkpoints.wait()
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 80, "transformers_version": "9"}))
    with pytest.raises(ConfigError, match=r"another model than model.path=.*: hidden_size 64 -> 80$"):
        start(tmp_path)


def test_a_checkpoint_can_begin_a_run_of_its_own(tmp_path):
    run = start(tmp_path, {"checkpoint.keep": 5})
    run.work(3)
    run.checkpoints.wait()
    for source, done in ((run.folder, 3), (run.folder / "checkpoints/step_2", 2)):
        branch = start(tmp_path, {"checkpoint.resume": str(source)}, name=f"branch-{done}")
        assert [line["step"] for line in branch.metrics()] == list(range(1, done + 1))
        branch.work(1)
        branch.checkpoints.wait()
        assert [line["step"] for line in branch.metrics()] == list(range(1, done + 2))
        assert steps(branch.folder) == [done + 1]
    assert steps(run.folder) == [3, 2, 1]
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        start(tmp_path, {"checkpoint.resume": str(tmp_path / "model")}, name="none")


def test_metrics_that_were_lost_are_not_passed_over(tmp_path):
    run = start(tmp_path)
    run.work(2)
    run.checkpoints.wait()
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ConfigError, match=r"metrics\.jsonl holds \d+ bytes, but held \d+ when the checkpoint"):
        start(tmp_path)


def live(tmp_path: Path, changes: dict, pipe) -> None:
    """Run in a separate process, until it is killed."""
    run = start(tmp_path, changes)
    pipe.send(run.done)
    for _ in range(10**6):
        run.work(1)
        pipe.send(run.done)


def test_killed_at_any_instant_it_goes_on_without_a_step_missing_or_repeated(tmp_path):
    """SIGKILL at ten moments, most of them in a save: the run saves and removes checkpoints after every step."""
    context, draws, reached = multiprocessing.get_context("fork"), random.Random(4), 0
    changes = {"run.steps": 10**6, "checkpoint.keep": 2, "checkpoint.keep_best": 1}
    for _ in range(10):
        ours, theirs = context.Pipe()
        process = context.Process(target=live, args=(tmp_path, changes, theirs))
        process.start()
        theirs.close()
        began = ours.recv()
        assert began >= reached
        while ours.recv() < began + 2:  # then one more checkpoint is complete, and `began` rises
            pass
        time.sleep(draws.random() / 20)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached = began + 1
        assert latest(tmp_path / "run/checkpoints").is_dir()
    run = start(tmp_path, changes)
    assert run.done >= reached
    run.work(2)
    whole = start(tmp_path, changes, name="whole")
    whole.work(run.done)
    assert run.metrics() == whole.metrics()
    run.checkpoints.wait()
    whole.checkpoints.wait()
