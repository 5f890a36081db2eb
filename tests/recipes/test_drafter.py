"""recipes/drafter.py and tools/train_drafter.py: from an actor and prompts to a drafter's folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from respec_trainer.config_file import load_config
from respec_trainer.drafter.format import check_drafter_folder, load_drafter
from respec_trainer.errors import ConfigError, DataError
from respec_trainer.recipes.drafter import DrafterRecipe, make_drafter, summary
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.weights.hf_folder import HFFolder
from tests.support.models import save_tiny_model, tiny_config

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(120)]
TINY = """
draft_vocab: 64
draft_steps: 2
prompts: {template: "Q {prompt}", max_prompt_tokens: 8}
rollouts: {prompts: 12, samples_per_prompt: 2, held_out: 3, max_new_tokens: 10}
training: {updates: 6, batch_size: 4, unroll: 3}
"""


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    """A tiny Qwen3 of four layers whose tokens are words, and prompts for it, one of them too long."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), tiny_config("qwen3", layers=4))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "Q", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    rows = [{"question": f"w{i} w{i + 1}", "answer": "#### 1"} for i in range(19)]
    rows.append({"question": " ".join(WORDS[:9]), "answer": "#### 1"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Answers:
    """A sampler whose responses count up from the prompt's last token."""

    def __init__(self):
        self.requests: list[Request] = []

    def __call__(self, requests):
        self.requests = list(requests)
        return [self.sample(request) for request in requests]

    @staticmethod
    def sample(request: Request) -> Sample:
        last = request.prompt_ids[-1]
        response = [*range(last + 1, last + 8), 2]
        return Sample(request.key, list(request.prompt_ids), response, [0.0] * 8, "stop", "a", "d")


def recipe(tmp_path, *overrides) -> DrafterRecipe:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_config(tmp_path / "tiny.yaml", overrides, DrafterRecipe)


def hf_config(actor):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(actor)


@pytest.fixture(scope="module")
def made(actor, tmp_path_factory):
    """(the drafter's folder, its sampler, the lines for the user)"""
    folder, answers, lines = tmp_path_factory.mktemp("made"), Answers(), []
    arguments = (recipe(folder), actor, actor / "prompts.jsonl", folder / "drafter")
    assert make_drafter(*arguments, notify=lines.append, sampler=answers)
    return folder / "drafter", answers, lines


def test_the_folder_is_a_drafter_for_this_actor(actor, made):
    folder, *_ = made
    check_drafter_folder(folder, hf_config(actor))
    config = json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == 64
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    with HFFolder(folder) as files:
        assert files.read("lm_head.weight").dtype == torch.bfloat16


def test_prompts_are_templated_sampled_and_never_repeated(made):
    _, answers, _ = made
    assert len(answers.requests) == 12 * 2
    assert len({request.prompt_ids for request in answers.requests}) == 12
    for request in answers.requests:
        assert request.prompt_ids[0] == 3 and len(request.prompt_ids) == 3  # "Q", and the long prompt is left out
        assert request.sampling.temperature == 1.0 and request.sampling.max_new_tokens == 10


def test_responses_are_sampled_and_learned_from_at_the_run_s_temperature(actor, made, tmp_path):
    """At a low temperature the same responses are learned from otherwise: the target is more certain of its tokens."""
    cold, answers = recipe(tmp_path, "rollouts.temperature=0.1"), Answers()
    assert make_drafter(
        cold, actor, actor / "prompts.jsonl", tmp_path / "out", notify=lambda line: None, sampler=answers
    )
    assert {request.sampling.temperature for request in answers.requests} == {0.1}
    facts = [json.loads((folder / "recipe.json").read_text())["facts"] for folder in (made[0], tmp_path / "out")]
    assert facts[0]["coverage"] == facts[1]["coverage"] and facts[0]["overlap"] != facts[1]["overlap"]
    assert made[1].requests[0].prompt_ids == answers.requests[0].prompt_ids


def test_the_draft_vocabulary_holds_the_tokens_of_training_responses(actor, made):
    folder, answers, _ = made
    _, ids = load_drafter(folder, hf_config(actor))
    expected = {token for request in answers.requests[6:] for token in Answers.sample(request).response_ids}
    assert len(expected) <= 64 and expected <= set(ids.tolist())


def test_what_was_measured_is_logged_and_kept(made):
    folder, _, lines = made
    facts = json.loads((folder / "recipe.json").read_text())["facts"]
    assert len(facts["acceptance"]) == len(facts["overlap"]) == 3
    assert 1.0 <= facts["accept_length"] <= 3.0 and 0.0 <= facts["coverage"] <= 1.0
    assert lines[-2:] == summary(facts, 2)
    assert any(line.startswith("update 6/6") for line in lines)


def test_a_draft_vocabulary_that_leaves_much_out_is_warned_of_with_the_number(made):
    folder, *_ = made
    facts = json.loads((folder / "recipe.json").read_text())["facts"]
    assert not any("WARNING" in line for line in summary(facts | {"coverage": 0.9}, 2))
    assert "covers only 89.9% of response tokens, less than 90%" in summary(facts | {"coverage": 0.899}, 2)[-1]


def test_epochs_are_passes_over_the_responses(actor, tmp_path):
    """12 prompts less 3 held out, twice each: 18 responses, in batches of 4."""
    lines, made = [], recipe(tmp_path, "training.updates=null", "training.epochs=2", "training.loss=mixed")
    arguments = (made, actor, actor / "prompts.jsonl", tmp_path / "out")
    assert make_drafter(*arguments, notify=lines.append, sampler=Answers())
    assert any(line.startswith("update 10/10") for line in lines)


@pytest.mark.parametrize("overrides", [["training.epochs=2"], ["training.updates=null"]])
def test_updates_or_epochs_one_of_them(tmp_path, overrides):
    with pytest.raises(ConfigError, match="one of updates and epochs"):
        recipe(tmp_path, *overrides)


def test_made_once_until_recipe_actor_or_data_change(actor, made, tmp_path):
    folder, *_ = made
    arguments = (recipe(tmp_path), actor, actor / "prompts.jsonl", folder)
    assert not make_drafter(*arguments, notify=pytest.fail, sampler=pytest.fail)
    data = tmp_path / "prompts.jsonl"
    data.write_text((actor / "prompts.jsonl").read_text() + '{"question": "w1", "answer": "1"}\n')
    with pytest.raises(InterruptedError):
        make_drafter(recipe(tmp_path), actor, data, folder, sampler=interrupt)
    with pytest.raises(InterruptedError):
        make_drafter(recipe(tmp_path, "training.updates=7"), *arguments[1:], sampler=interrupt)
    assert not make_drafter(*arguments, sampler=pytest.fail)  # both interruptions left the folder unchanged


def interrupt(requests):
    raise InterruptedError


def test_going_on_from_a_drafter_keeps_its_vocabulary_and_starts_from_its_weights(actor, made, tmp_path):
    folder, *_ = made
    arguments = (recipe(tmp_path, "training.lr=1e-12", "training.matrix_lr=1e-12"), actor, actor / "prompts.jsonl")
    assert make_drafter(*arguments, tmp_path / "next", start=folder, notify=lambda line: None, sampler=Answers())
    (before, ids), (after, same) = (load_drafter(f, hf_config(actor)) for f in (folder, tmp_path / "next"))
    assert torch.equal(ids, same)
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["training.unroll=1"], ConfigError, "unroll=1 is less than draft_steps=2"),
        (["rollouts.held_out=19"], DataError, "19 prompts, no more than rollouts.held_out=19"),
        (["draft_vocab=192"], ConfigError, "draft_vocab_size=192 .* at most the target's vocab_size 131"),
        (["prompts.prompt_column=text"], DataError, "line 1: no column 'text'"),
    ],
)
def test_settings_that_cannot_work_are_refused(actor, tmp_path, overrides, error, words):
    with pytest.raises(error, match=words):
        make_drafter(
            recipe(tmp_path, *overrides),
            actor,
            actor / "prompts.jsonl",
            tmp_path / "out",
            notify=lambda line: None,
            sampler=Answers(),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 128, "hidden_size .* 128, but 64 in the target"),
        ("vocab_size", 256, "vocab_size .* 256, but 131 in the target"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, "rope_theta .* 5.0.*, but .* 10000.0"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}, r"layers 0 to 2, .* not \[0, 1, 7\]"),
    ],
)
def test_a_drafter_of_another_actor_is_refused_before_anything_is_sampled(actor, made, tmp_path, key, value, words):
    other = shutil.copytree(made[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    arguments = (recipe(tmp_path), actor, actor / "prompts.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match=words):
        make_drafter(*arguments, start=other, notify=pytest.fail, sampler=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "three layers below the last one; the target has only 3 layers"),
        ({"layers": 4, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' is not"),
    ],
)
def test_an_actor_that_no_drafter_fits_is_refused_before_anything_is_sampled(actor, tmp_path, changes, words):
    other = save_tiny_model(tmp_path / "other", tiny_config("qwen3", **changes))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(actor / name, other / name)
    with pytest.raises(ConfigError, match=words):
        make_drafter(recipe(tmp_path), other, actor / "prompts.jsonl", tmp_path / "out", sampler=pytest.fail)


def test_paths_that_do_not_exist(actor, tmp_path):
    for paths, words in (((tmp_path / "no", tmp_path), "no actor at"), ((actor, tmp_path / "no"), "no data at")):
        with pytest.raises(ConfigError, match=words):
            make_drafter(recipe(tmp_path), *paths, tmp_path / "out")
    with pytest.raises(ConfigError, match="no drafter to start from"):
        make_drafter(recipe(tmp_path), actor, actor / "prompts.jsonl", tmp_path / "out", start=tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a Hugging Face model folder"):
        make_drafter(recipe(tmp_path), tmp_path / "empty", actor / "prompts.jsonl", tmp_path / "out")


def test_the_command_reports_errors(actor, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "tools/train_drafter.py", "--recipe", str(tmp_path / "tiny.yaml"), "--actor", "absent"]
    command += ["--data", str(actor / "prompts.jsonl"), "--out", str(tmp_path / "out"), "training.updates=9"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr.strip().endswith("train_drafter: no actor at absent")


def test_the_quickstart_recipe_is_valid_and_fits_the_run():
    made = load_config(ROOT / "configs" / "quickstart-drafter.yaml", (), DrafterRecipe)
    run = load_config(ROOT / "configs" / "quickstart.yaml")
    assert made.prompts.template == run.data.template and made.draft_steps == run.speculation.steps
    assert made.rollouts.max_new_tokens == run.rollout.sampling.max_new_tokens
    assert made.rollouts.temperature == run.rollout.sampling.temperature
    assert made.prompts.max_prompt_tokens == run.data.max_prompt_tokens
