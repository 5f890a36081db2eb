"""preflight.py: what is wrong with files and machine is said before any process group is made."""

from __future__ import annotations

import json
import socket

import pytest

from respec_trainer.errors import ConfigError, DataError
from respec_trainer.preflight import preflight
from tests.configs import smallest_config
from tests.models import save_tiny_model, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), tiny_config("qwen3"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def check(actor, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    folders = [f"model.path={actor}", f"data.path={data}"]

    def check(*overrides, world=1):
        preflight(smallest_config(tmp_path, *folders, *overrides), world, rank=0)

    check.folder = tmp_path
    return check


def test_a_good_configuration_passes(check):
    check()


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["model.path=absent"], 1, "no folder absent"),
        (["rollout.sampling.max_new_tokens=256"], 1, "no room for a prompt"),
        (["actor.parallel.tp=3"], 3, "tp=3"),
        (["rollout.engine.tp=2"], 2, "rollout.engine.span=2"),
        (["speculation.algorithm=eagle3", "drafter.path=absent"], 1, "absent"),
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
