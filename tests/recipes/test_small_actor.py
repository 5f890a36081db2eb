"""recipes/small_actor.py and tools/make_actor.py: a whole folder from a recipe, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config import DataConfig
from respec_trainer.config_file import load_config
from respec_trainer.data.prompts import load_prompts
from respec_trainer.data.word_problems import split_of
from respec_trainer.errors import ConfigError
from respec_trainer.recipes.small_actor import ActorRecipe, make_actor
from respec_trainer.recipes.solve import solve_rate

ROOT = Path(__file__).parents[2]
TINY = """
model: {vocab_size: 400, hidden_size: 32, intermediate_size: 48, layers: 4, heads: 2, kv_heads: 1, head_dim: 16,
        context: 256}
problems: {mix: {1: 1.0}, largest: 9}
teaching: {steps: 4, problems: 4, sheets: 2}
prompts: {train: 20, test: 10}
"""


def recipe(tmp_path, *overrides):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_config(tmp_path / "tiny.yaml", overrides, ActorRecipe)


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    lines = []
    assert make_actor(recipe(folder), folder / "actor", lines.append)
    assert "solves" in lines[-1]
    return folder / "actor"


def test_the_folder_is_a_hugging_face_model_with_its_tokenizer(actor):
    define_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(actor), AutoTokenizer.from_pretrained(actor)
    assert model.config.model_type == "qwen3" and model.dtype == torch.bfloat16
    assert not model.config.tie_word_embeddings and model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) <= model.config.vocab_size
    text = "Q: Ann has 12 apples.\nA: "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # nothing added before or after


def test_its_prompts_load(actor):
    define_torchvision_operators()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(actor)
    for split, count in (("train", 20), ("test", 10)):
        path = actor / "data" / f"{split}.jsonl"
        prompts = load_prompts(DataConfig(path=str(path), prompts_per_step=2), tokenizer, 128)
        assert len(prompts) == count and all("####" in prompt.answer for prompt in prompts)
        assert all(split_of(prompt.text) == split for prompt in prompts)


def test_an_equal_recipe_changes_nothing_another_one_does(actor, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in actor.rglob("*")}
    assert not make_actor(recipe(tmp_path), actor, pytest.fail)
    assert {path: path.stat().st_mtime_ns for path in actor.rglob("*")} == before
    made = json.loads((actor / "recipe.json").read_text())
    assert made["facts"].keys() == {"loss", "solve_rate", "seconds"}
    assert make_actor(recipe(tmp_path, "seed=1"), tmp_path / "other", lambda line: None)
    assert (tmp_path / "other" / "data" / "train.jsonl").read_text() != (actor / "data" / "train.jsonl").read_text()


def test_recipes_repeat(actor, tmp_path):
    make_actor(recipe(tmp_path), tmp_path / "again", lambda line: None)
    for name in ("data/train.jsonl", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (actor / name).read_bytes(), name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teaching.step=5", "did you mean teaching.steps"),
        ("problems.mix={7: 1.0}", "numbers of steps from 1 to 4"),
        ("teaching.direct=2", "less than or equal to 1"),
        ("problems.largest=3", "greater than or equal to 4"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        recipe(tmp_path, override)


def test_solve_rate_counts_right_answers(monkeypatch):
    define_torchvision_operators()
    from respec_trainer.data.word_problems import make_problem
    from respec_trainer.recipes.tokenizer import train_tokenizer

    problems = [make_problem(0, i, {1: 1.0}) for i in range(4)]
    tokenizer = train_tokenizer((p.question + p.answer for p in problems), 300)

    class Model:
        """A model that answers the first and the last problem right."""

        def eval(self):
            pass

        def generate(self, ids, **_):
            answers = [problems[0].answer, "### 1", problems[2].answer + "0", problems[3].answer]
            rows = [tokenizer(answer)["input_ids"] for answer in answers]
            width = max(map(len, rows))
            return torch.cat([ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], 1)

    assert solve_rate(Model(), tokenizer, "{prompt}", problems) == 0.5


def test_the_command(tmp_path, actor):
    (tmp_path / "tiny.yaml").write_text(TINY)

    def run(*arguments):
        command = [sys.executable, "tools/make_actor.py", "--recipe", str(tmp_path / "tiny.yaml"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    again = run("--out", str(actor))
    assert again.returncode == 0 and "already made" in again.stdout, again.stderr
    refused = run("--out", str(actor), "seeds=1")
    assert refused.returncode == 2 and "did you mean seed" in refused.stderr and "Traceback" not in refused.stderr


def test_the_quickstart_recipe_is_valid_and_fits_the_run():
    made = load_config(ROOT / "configs" / "quickstart-actor.yaml", (), ActorRecipe)
    run = load_config(ROOT / "configs" / "quickstart.yaml")
    assert made.problems.template == run.data.template
    assert made.prompts.train >= run.run.steps * run.data.prompts_per_step  # no prompt is seen twice
