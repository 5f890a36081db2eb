from __future__ import annotations

import pytest

from respec_trainer.checkpoint.resume import candidates, check_compatible, restore_logs, run_to_continue
from respec_trainer.config_file import dump_config, valid_keys
from respec_trainer.errors import ConfigError
from tests.support.configs import smallest_config


def test_the_run_to_go_on_with_is_the_newest_of_its_name_that_has_checkpoints(tmp_path):
    config = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=5")
    assert run_to_continue(config) is None
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-x", "tiny-11", "tinier"):
        (tmp_path / name).mkdir()
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-x", "tinier"):
        (tmp_path / name / "checkpoints/step_4").mkdir(parents=True)
    assert run_to_continue(config) == tmp_path / "tiny-10"
    for resume in ("never", str(tmp_path / "tiny")):
        asked = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=5", f"checkpoint.resume={resume}")
        assert run_to_continue(asked) is None
    finished = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=4")
    assert run_to_continue(finished) is None, "nothing is left to be done"


def test_a_path_is_a_run_or_one_of_its_checkpoints(tmp_path):
    root = tmp_path / "old/checkpoints"
    for step in (2, 10):
        (root / f"step_{step}").mkdir(parents=True)
    for path, expected in ((tmp_path / "old", ["step_10", "step_2"]), (root / "step_2", ["step_2"])):
        found = candidates(smallest_config(tmp_path, f"checkpoint.resume={path}"), tmp_path / "new")
        assert [checkpoint.name for checkpoint in found] == expected
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=.*nowhere holds no checkpoint"):
        candidates(smallest_config(tmp_path, f"checkpoint.resume={tmp_path / 'nowhere'}"), tmp_path / "new")


def test_every_key_that_may_differ_exists():
    from respec_trainer.checkpoint.resume import MAY_DIFFER

    assert set(MAY_DIFFER) <= set(valid_keys())


def test_a_checkpoint_of_a_version_with_other_keys_says_so_and_what_to_do(tmp_path):
    config = smallest_config(tmp_path)
    meta = {"optimizer": True, "model": {}}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    check_compatible(tmp_path, meta, config, {})
    (tmp_path / "config.yaml").write_text(dump_config(config) + "unheard: {of: true}\n")
    with pytest.raises(ConfigError, match=r"another version of respec_trainer.*checkpoint\.resume=never.*\n.*unheard"):
        check_compatible(tmp_path, meta, config, {})


def test_logs_end_where_they_did(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    log = run / "metrics.jsonl"
    log.write_text("one\ntwo\nthr")
    with log.open("a") as writer:  # the run's own recorder has it open too
        assert restore_logs(run, run, {"metrics.jsonl": 4, "samples.jsonl": 0}) == []
        writer.write("2\n")
    assert log.read_text() == "one\n2\n"
    assert restore_logs(other, run, {"metrics.jsonl": 4, "samples.jsonl": 9}) == ["samples.jsonl"]
    assert (other / "metrics.jsonl").read_text() == "one\n"
    assert log.read_text() == "one\n2\n"
    with pytest.raises(ConfigError, match="samples.jsonl holds 0 bytes, but held 9"):
        restore_logs(run, run, {"samples.jsonl": 9})
