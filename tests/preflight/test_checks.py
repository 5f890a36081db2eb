"""preflight/checks.py: what is wrong with files and machine is said before any process group is made."""

from __future__ import annotations

import json
import socket

import pytest

from respec_trainer.drafter.format import save_drafter
from respec_trainer.errors import ConfigError, DataError
from respec_trainer.preflight.checks import check_rejection_sampling, every_problem, preflight
from tests.support.configs import smallest_config
from tests.support.drafters import DRAFT_IDS, tiny_drafter
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer
from tests.support.rewards import reward_file


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

    check.folder, check.folders, check.actor = tmp_path, folders, actor
    return check


def test_a_good_configuration_passes(check):
    check()


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["model.path=absent"], 1, "no folder absent"),
        (["rollout.sampling.max_new_tokens=256"], 1, "no room for a prompt"),
        (["actor.parallel.tp=3"], 3, "tp=3"),
        (["speculation.algorithm=eagle3", "drafter.path=absent"], 1, "absent"),
    ],
)
def test_bad_settings_name_the_key(check, overrides, world, words):
    with pytest.raises(ConfigError, match=words):
        check(*overrides, world=world)


@pytest.fixture
def draft(check, actor):
    """Preflight with a drafter's folder, of a model of the actor's family with `changes` to its config."""
    small = check.folder / "small"

    def draft(*overrides, **changes):
        if not small.exists():
            save_tiny_model(small, tiny_config("qwen3", layers=1, **changes))
            tiny_tokenizer().save_pretrained(small)
        return check("speculation.algorithm=standalone", f"drafter.path={small}", *overrides)

    draft.folder = small
    return draft


def test_a_smaller_model_may_draft(draft):
    draft(hidden_size=32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 140}, "drafter.path: vocab_size in .* is 140, but 131 in the target"),
        ({"max_position_embeddings": 128}, "drafter.path: max_position_embeddings in .* is 128, but 256"),
        ({"attention_bias": True}, "drafter.path: .*attention_bias=true"),
    ],
)
def test_a_model_that_cannot_draft_for_the_actor(draft, changes, words):
    with pytest.raises(ConfigError, match=words):
        draft(**changes)


def test_a_drafter_of_another_tokenizer(draft):
    draft()
    path = draft.folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="drafter.path: the tokenizer in .*small is not the target's: 'A' is token"):
        draft()


def test_a_standalone_drafter_on_a_gpu(draft):
    with pytest.raises(ConfigError, match="standalone does not work on GPUs.*weights would be lost.*eagle3"):
        draft("run.device=cuda")


def test_an_eagle_drafter_is_no_model(draft):
    draft()
    path = draft.folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="EAGLE drafter.*speculation.algorithm=eagle3"):
        draft()


def test_incomplete_standalone_drafters(check):
    folder = check.folder / "empty"
    for words in ("no folder", "holds no weights", "config.json cannot be read"):
        with pytest.raises(ConfigError, match=f"drafter.path: .*{words}"):
            check("speculation.algorithm=standalone", f"drafter.path={folder}")
        if folder.exists():
            (folder / "model.safetensors").touch()
        folder.mkdir(exist_ok=True)


def test_rejection_sampling_needs_the_full_vocabulary(check):
    deep = save_tiny_model(check.folder / "deep", tiny_config("qwen3", layers=4))
    tiny_tokenizer().save_pretrained(deep)
    folder = check.folder / "eagle"
    save_drafter(tiny_drafter(tiny_config("qwen3", layers=4)), DRAFT_IDS, folder)
    shape = ["speculation.algorithm=eagle3", f"drafter.path={folder}", f"model.path={deep}"]
    check(*shape)
    with pytest.raises(ConfigError, match="full vocabulary.*draft_vocab_size in .*eagle is 64 of 131"):
        check(*shape, "speculation.rejection_sampling=true")
    config = smallest_config(check.folder, *shape, "speculation.rejection_sampling=true")
    drafter = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(drafter | {"draft_vocab_size": 131}))
    check_rejection_sampling(config)


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
    preflight(smallest_config(check.folder, *check.folders, *shape), world_size=2, rank=1)  # the first rank alone tries


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
