"""preflight/checks.py: what is wrong with files and machine is said before any process group is made."""

from __future__ import annotations

import socket

import pytest

from respec_trainer.errors import ConfigError, DataError
from respec_trainer.preflight.checks import every_problem
from tests.support.configs import smallest_config


def test_a_good_configuration_passes(check):
    check()


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["model.path=absent"], 1, "no folder absent"),
        (["rollout.sampling.max_new_tokens=256"], 1, "no room for a prompt"),
        (["actor.parallel.tp=3"], 3, "tp=3"),
        (["objective.kind=grp0"], 1, "objective.kind=grp0: .*did you mean 'grpo'"),
        (["telemetry.trackers=[jsonl, tensorbord]"], 1, "telemetry.trackers=tensorbord: .*'tensorboard'"),
        (["telemetry.trackers=[tensorboard]"], 1, "telemetry.trackers=.*has no jsonl"),
    ],
)
def test_bad_settings_name_the_key(check, overrides, world, words):
    with pytest.raises(ConfigError, match=words):
        check(*overrides, world=world)


def test_incomplete_model_folder(check):
    folder = check.folder / "half"
    folder.mkdir()
    with pytest.raises(ConfigError, match="config.json"):
        check(f"model.path={folder}")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="weights"):
        check(f"model.path={folder}")


def test_bad_data_names_file_and_line(check):
    with pytest.raises(DataError, match="absent.jsonl"):
        check("data.path=absent.jsonl")
    rows = check.folder / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl.*2"):
        check(f"data.path={rows}")


def test_occupied_ports(check, monkeypatch):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"resync.port={port} is occupied"):
            check(f"resync.port={port}")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match="--master_port"):
            check()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as under torchrun, whose agent listens there
        check()


def test_a_meeting_place_nobody_knows(check, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(ConfigError, match="MASTER_ADDR=no-such-host.invalid.*--master_addr"):
        check()


def test_an_engine_must_be_able_to_cut_the_model(check):
    with pytest.raises(ConfigError, match="rollout.engine.tp=3 does not divide the model's 4 attention heads"):
        check("rollout.engine.tp=3", "rollout.engine.span=1")


def test_every_problem_is_found(check):
    shape = ["rollout.sampling.max_new_tokens=256", "data.path=absent.jsonl", "checkpoint.resume=absent"]
    found = every_problem(smallest_config(check.folder, f"model.path={check.actor}", *shape))
    assert len(found) == 3, found


def test_what_needs_the_model_is_left_out_without_one(check):
    found = every_problem(smallest_config(check.folder, "model.path=absent", "data.path=absent.jsonl"))
    assert ["no folder absent" in str(found[0]), "no file absent.jsonl" in str(found[1]), len(found)] == [True, True, 2]
