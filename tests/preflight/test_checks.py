"""preflight/checks.py: problems of files and machine are reported before any process group is made."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

from respec_trainer.errors import ConfigError, DataError
from respec_trainer.preflight.checks import every_problem, preflight
from tests.support.configs import smallest_config
from tests.support.rewards import reward_file


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


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return {'score': 1.0}", r"first row of data\.path: .*:reward returned {'score': 1.0}.*'', answer '#### 2'"),
        ("return float('nan')", "returned nan for prompt '1 [+] 1[?]', response ''"),
        (
            "return len(response.split()[-1])",
            r"failed on .*IndexError.*mine\.py, line 2\); a policy can write any text",
        ),
    ],
)
def test_a_reward_is_tried_on_the_first_row(check, body, words):
    reward = reward_file(check.folder, f"def reward(response, answer):\n    {body}\n")
    shape = ["reward.kind=function", f"reward.function={reward.function}"]
    with pytest.raises(ConfigError, match=words):
        check(*shape)
    preflight(
        smallest_config(check.folder, *check.folders, *shape), world_size=2, rank=1
    )  # only rank 0 calls the reward


@pytest.mark.parametrize("body", ["return None", "return 0 if response else -1", "return answer == '#### 2'"])
def test_a_reward_may_skip_an_empty_response_or_give_it_any_number(check, body):
    reward = reward_file(check.folder, f"def reward(response, answer):\n    {body}\n")
    check("reward.kind=function", f"reward.function={reward.function}")


def test_a_reward_on_trial_is_given_the_row(check):
    rows = check.folder / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "1", "level": 3}\n')
    code = "def reward(items):\n    return [{}[repr((i.prompt, i.response_ids, i.truncated, i.row))] for i in items]\n"
    reward = reward_file(check.folder, code)
    with pytest.raises(ConfigError, match=r"KeyError: .*\('<a>', \(\), False, {'level': 3}\)"):
        check(
            f"data.path={rows}",
            "data.template='<{prompt}>'",
            "reward.kind=function",
            f"reward.function={reward.function}",
        )


@pytest.mark.parametrize(
    ("override", "words"),
    [("reward.kind=exact", "did you mean 'exact_answer'"), ("reward.marker=''", "reward: marker='' marks nothing")],
)
def test_bad_rewards_are_named(check, override, words):
    with pytest.raises(ConfigError, match=words):
        check(override)


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


def test_a_master_address_that_cannot_be_resolved(check, monkeypatch):
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


def test_only_the_first_rank_needs_the_ports(check):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        config = smallest_config(check.folder, *check.folders, f"resync.port={server.getsockname()[1]}")
        preflight(config, world_size=2, rank=1)


def test_a_tokenizer_that_does_not_fit_or_cannot_be_read_is_named(check):
    folder = check.folder / "other"
    shutil.copytree(check.actor, folder)
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"vocab_size": 10}))
    with pytest.raises(ConfigError, match="model.path: the tokenizer in .*other has .* tokens, but .* is 10;"):
        check(f"model.path={folder}")
    (folder / "config.json").write_text(json.dumps(sizes))
    check(f"model.path={folder}")
    (folder / "tokenizer.json").write_text("{")
    found = every_problem(smallest_config(check.folder, f"model.path={folder}", *check.folders[1:]))
    assert len(found) == 1
