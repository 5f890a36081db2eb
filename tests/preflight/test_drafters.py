"""preflight/drafters.py: a folder that cannot draft for the model is refused, with the key and the remedy."""

from __future__ import annotations

import json

import pytest

from respec_trainer.drafter.format import save_drafter
from respec_trainer.errors import ConfigError
from respec_trainer.preflight.drafters import FOLDER_CHECKS, check_rejection_sampling
from respec_trainer.speculation.algorithms import DrafterFolder
from tests.support.configs import smallest_config
from tests.support.drafters import DRAFT_IDS, tiny_drafter
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer


def test_every_kind_of_folder_has_a_check():
    assert set(FOLDER_CHECKS) == set(DrafterFolder)


def test_an_absent_drafter(check):
    with pytest.raises(ConfigError, match="absent"):
        check("speculation.algorithm=eagle3", "drafter.path=absent")


@pytest.fixture
def draft(check, actor):
    """Run preflight with a drafter's folder: a model of the actor's family with `changes` to its config."""
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
    with pytest.raises(ConfigError, match="absent.json"):
        check(*shape, "speculation.policy=adaptive", "speculation.profile=absent.json")
    with pytest.raises(ConfigError, match="full vocabulary.*draft_vocab_size in .*eagle is 64 of 131"):
        check(*shape, "speculation.rejection_sampling=true")
    config = smallest_config(check.folder, *shape, "speculation.rejection_sampling=true")
    drafter = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(drafter | {"draft_vocab_size": 131}))
    check_rejection_sampling(config)
