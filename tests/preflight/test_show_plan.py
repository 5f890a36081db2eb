"""preflight/show_plan.py: shipped configurations pass and every problem is found, without GPU, weights or network."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from respec_trainer.config_file import load_config
from respec_trainer.preflight.show_plan import Question, check
from tests.support.configs import smallest_config
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = {
    "qwen2.5-3b": (1, 2),
    "qwen2.5-7b": (2, 8),
    "qwen2.5-14b": (2, 8),
    "qwen2.5-3b-1node": (1, 8),
    "qwen2.5-7b-1node": (1, 8),
    "qwen2.5-14b-1node": (1, 8),
}


def ask(config, question: Question) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=300)
    status = check(config, question, console)
    return status, console.file.getvalue()


def ask_shipped(name: str, *overrides: str, **more) -> tuple[int, str]:
    nodes, gpus = SHIPPED[name]
    shape = CONFIGS / f"models/{name.removesuffix('-1node')}.json"
    return ask(load_config(CONFIGS / f"{name}.yaml", overrides), Question(nodes, gpus, model_config=str(shape), **more))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_pass(name):
    status, text = ask_shipped(name, gpu_memory_gb=79.1)  # the memory of an H100-80GB
    assert status == 0, text
    assert "no problem found" in text
    assert ("watchdog sends UDP" in text) == (SHIPPED[name][0] > 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actor.micro_batch_size=32"], "phase train takes .* lower actor.micro_batch_size"),
        (["actor.recompute=false", "actor.micro_batch_size=4"], "phase train takes"),
        (["drafter.micro_batch_size=8"], "phase generate takes .* drafter.micro_batch_size"),
        (["rollout.engine.mem_fraction=0.2"], "cache holds 0 tokens, but a sample may have 9216"),
        (["drafter.memory_mb=6000"], "drafter.memory_mb=6000 is less than the .* MB that the drafter"),
        (["actor.parallel.tp=8"], "actor.parallel.tp=8 does not divide the model's 28 attention heads"),
        (["rollout.engine.tp=8"], "rollout.engine.tp=8 does not divide the model's 28 attention heads"),
        (["rollout.sampling.max_new_tokens=40000"], "leaves no room for a prompt"),
    ],
)
def test_what_does_not_fit_is_named(overrides, words):
    status, text = ask_shipped("qwen2.5-7b-1node", *overrides)
    assert status == 2 and re.search("problem: .*" + words, text), text


def test_every_problem_is_found_at_once(tmp_path):
    shape = ["model.path=absent", "data.path=absent.jsonl", "actor.parallel.tp=3", "reward.kind=function"]
    config = smallest_config(tmp_path, *shape, "reward.function=absent.py:score")
    status, text = ask(config, Question(nodes=1, gpus_per_node=4))
    assert status == 2 and text.count("problem: ") == 4, text
    for words in ("no folder absent", "no file absent.jsonl", "tp=3 does not divide the 4 ranks", "absent.py"):
        assert words in text


def test_a_folder_with_nothing_but_a_config_is_planned_for(tmp_path):
    folder = tmp_path / "actor"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen2").to_dict()))
    config = smallest_config(tmp_path, f"model.path={folder}", f"data.path={tmp_path}/absent.jsonl", "run.device=auto")
    status, text = ask(config, Question(nodes=1, gpus_per_node=2, gpu_memory_gb=80))
    assert status == 2 and "holds no weights" in text and "key/value cache" in text and "2 problems found" in text


def test_a_model_that_cannot_be_trained_has_no_sizes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("qwen2").to_dict() | {"model_type": "gpt2"}))
    config = smallest_config(tmp_path, "run.device=auto")
    status, text = ask(config, Question(1, 2, model_config=str(path)))
    assert status == 2 and text.count("problem: ") == 1 and "model_type 'gpt2' is not supported" in text


def test_a_run_without_gpus_passes(tmp_path):
    folder = save_tiny_model(tmp_path / "actor", tiny_config("qwen2"))
    tiny_tokenizer().save_pretrained(folder)
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    config = smallest_config(tmp_path, f"model.path={folder}", f"data.path={data}", "actor.parallel.tp=2")
    status, text = ask(config, Question())
    assert status == 0 and "1 x 2 ranks without a GPU" in text and "GB of a GPU" not in text, text
