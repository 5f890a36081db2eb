from __future__ import annotations

import json
from pathlib import Path

import pytest

from respec_trainer.checkpoint.files import write_text
from respec_trainer.checkpoint.meta import check_files, read_meta
from respec_trainer.checkpoint.store import (
    begin,
    checkpoints_in,
    latest,
    point,
    publish,
    read_state,
    retain,
    step_of,
    tidy,
)
from respec_trainer.errors import ConfigError

META = {"tp": 1, "dp": 1, "zero": 1, "dtype": "fp32", "optimizer": True, "model": {}, "parameters": {}}


def make(root: Path, step: int, reward: float | None = None) -> Path:
    partial = begin(root, step)
    written = {"actor/tp0_dp0.safetensors": write_text(partial / "actor/tp0_dp0.safetensors", f"of step {step}" * 9)}
    (partial / "state.json").write_text(json.dumps({"metrics": {"reward/mean": reward}}))
    return publish(partial, META | {"step": step}, written)


def test_a_published_checkpoint_is_found_pointed_to_and_whole(tmp_path):
    for step in (9, 10):
        assert make(tmp_path, step) == tmp_path / f"step_{step}"
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_10", "step_9"]
    assert (tmp_path / "latest").read_text() == "step_10\n"
    assert latest(tmp_path) == tmp_path / "step_10"
    files = read_meta(tmp_path / "step_10")["files"]
    assert sorted(files) == ["actor/tp0_dp0.safetensors", "state.json"]
    assert check_files(tmp_path / "step_10", files, files) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_10", "step_9"]


def test_nothing_is_overwritten(tmp_path):
    make(tmp_path, 1)
    with pytest.raises(FileExistsError, match="step_1 exists"):
        begin(tmp_path, 1)


def scores(path: Path) -> float | None:
    return json.loads((path / "state.json").read_text())["metrics"]["reward/mean"]


def test_the_newest_and_the_best_are_kept_and_what_latest_names(tmp_path):
    for step, reward in ((1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, 0.2), (6, 0.25)):
        make(tmp_path, step, reward)
    retain(tmp_path, newest=2, best=2, score=scores)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [6, 5, 4, 2]
    point(tmp_path / "step_2")
    retain(tmp_path, newest=1, best=0, score=scores)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [6, 2]
    assert not list(tmp_path.glob(".*"))


def test_going_on_leaves_nothing_half_done_and_loses_nothing(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step_2.damaged-1").mkdir()
    begin(tmp_path, 4)
    (tmp_path / ".step_9.dropped-77").mkdir()
    (tmp_path / ".latest-77").write_text("step_")
    aside = tidy(tmp_path, tmp_path / "step_1")
    assert sorted(path.name for path in aside) == ["step_2.damaged-2", "step_3.damaged-1"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_1"]
    assert latest(tmp_path) == tmp_path / "step_1"
    assert not list(tmp_path.glob(".*"))


def test_a_state_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3}')
    assert read_state(tmp_path) == {"step": 3}
    (tmp_path / "state.json").write_text('{"step')
    with pytest.raises(ConfigError, match="state.json cannot be read"):
        read_state(tmp_path)
    (tmp_path / "state.json").unlink()
    with pytest.raises(ConfigError, match="state.json cannot be read: .*No such file"):
        read_state(tmp_path)
