"""Checkpoints of several ranks: all of them save, resume and fail together."""

from __future__ import annotations

from pathlib import Path

import pytest

from respec_trainer.checkpoint.store import checkpoints_in, latest, step_of
from tests.support.checkpoints import ToyRun, damage, toy_config
from tests.support.disks import full_disk
from tests.support.processes.ranks import run_ranks

RANKS = 2


def run_on_rank(folder: Path, changes: dict) -> ToyRun:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return ToyRun(folder / "run", toy_config(folder, changes), dist.get_rank(), dist.get_world_size())


def work(folder: Path, steps: int) -> tuple:
    """Resume if there is a checkpoint, do `steps` more steps, and return the state."""
    run = run_on_rank(folder, {"checkpoint.keep": 3})
    began = run.done, run.own.value, run.shared.value
    run.work(steps)
    run.checkpoints.wait()
    return began, run.said, run.actor.values["master"].sum().item()


def fail_on_the_last_rank(folder: Path) -> tuple[str, str]:
    """Return the errors of every rank's next save and of its wait, when the last rank's disk is full."""
    import torch.distributed as dist

    from respec_trainer.errors import CheckpointError

    run = run_on_rank(folder, {})
    run.work(1)
    run.checkpoints.wait()
    raised = []
    with full_disk(lambda path: dist.get_rank() == RANKS - 1 and path.suffix == ".safetensors"):
        for action in (lambda: run.work(1), run.checkpoints.wait):
            run.work(1)
            with pytest.raises(CheckpointError) as error:
                action()
            raised.append(str(error.value))
    return tuple(raised)


def test_ranks_save_and_resume_together_also_as_fewer_or_more(tmp_path):
    toy_config(tmp_path)  # makes the model's folder, once
    first = run_ranks(RANKS, work, tmp_path, 3)
    assert [began for began, *_ in first] == [(0, 0, 0)] * RANKS
    assert [step_of(path) for path in checkpoints_in(tmp_path / "run/checkpoints")] == [3, 2, 1]
    names = {path.name for path in (tmp_path / "run/checkpoints/step_3").rglob("*.safetensors")}
    assert names == {f"tp{rank}_dp0.safetensors" for rank in range(RANKS)} | {"rank0.safetensors", "rank1.safetensors"}
    damage(tmp_path / "run/checkpoints/step_3/ranks/rank1.safetensors")
    # own.value is 3 x (the last step's number, from 0) + rank; shared.value twice that number.
    second = run_ranks(RANKS, work, tmp_path, 2)
    assert [began for began, *_ in second] == [(2, 3 + rank, 2) for rank in range(RANKS)]
    for _, said, _ in second:
        assert "rank1.safetensors is corrupted" in said[0]
    (fewer,) = run_ranks(1, work, tmp_path, 1)
    assert fewer[0] == (4, 9, 6)
    assert "saved at tp 2 x dp 1, at tp 1 x dp 1; the state of single ranks" in fewer[1][-1]
    more = run_ranks(RANKS, work, tmp_path, 0)
    assert [began for began, *_ in more] == [(5, 12, 8)] * RANKS
    assert [total for *_, total in more] == [fewer[2]] * RANKS


def test_one_ranks_full_disk_is_an_error_on_all_ranks(tmp_path):
    toy_config(tmp_path)
    for raised in run_ranks(RANKS, fail_on_the_last_rank, tmp_path):
        for error in raised:
            assert "failed: rank 1: " in error
            assert "safetensors: No space left on device" in error
    assert [step_of(path) for path in checkpoints_in(tmp_path / "run/checkpoints")] == [1]
    assert latest(tmp_path / "run/checkpoints").name == "step_1"
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
