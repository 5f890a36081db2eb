"""The small actor of the quickstart: a Qwen3 that has nearly learned arithmetic word problems, ready for RL.

It answers in two ways, because its teaching shows worked solutions for most problems and only the final answer for the
others. With a worked solution it is mostly right; without one it guesses. Reinforcement learning makes worked solutions
more frequent, as it does in large models, and the reward rises within tens of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from respec_trainer.compat.precision import bf16_is_quick
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section
from respec_trainer.data.word_problems import check_mix, make_problem, write_jsonl
from respec_trainer.recipes.folder import make_once
from respec_trainer.recipes.lessons import Lessons
from respec_trainer.recipes.solve import solve_rate
from respec_trainer.recipes.supervised import train_supervised
from respec_trainer.recipes.tokenizer import train_tokenizer

# Increase it whenever an equal recipe gives another result than before: older folders are then made again.
REVISION = 3
# The streams of problems of one seed: those for supervised learning, for RL, and for tests.
TEACHING, TRAINING, TESTING = 0, 1, 2

Notify = Callable[[str], None]


class ModelRecipe(Section):
    vocab_size: Annotated[int, Field(ge=300)] = 512  # 256 bytes, the special tokens, and merges
    hidden_size: PositiveInt = 192
    intermediate_size: PositiveInt = 512
    layers: PositiveInt = 6
    heads: PositiveInt = 6
    kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    context: PositiveInt = 1024


class ProblemRecipe(Section):
    mix: dict[int, float]  # weight of each number of arithmetic steps, 1 to 4
    largest: Annotated[int, Field(ge=4, le=100)] = 30  # limit of the numbers in a question
    template: str = "Q: {prompt}\nA: "

    @model_validator(mode="after")
    def _mix_can_be_drawn_from(self) -> ProblemRecipe:
        check_mix(self.mix)
        return self


class TeachingRecipe(Section):
    steps: PositiveInt
    problems: PositiveInt = 8  # word problems a batch
    sheets: NonNegativeInt = 8  # rows of equations without text a batch: several times more arithmetic per token
    direct: Fraction = 0.4  # share of the word problems shown with the final answer alone
    lr: PositiveFloat = 3e-3  # AdamW: embeddings, norms, output layer
    matrix_lr: PositiveFloat = 2e-2  # Muon: the layers' matrices
    warmup_steps: NonNegativeInt = 50
    decay: Fraction = 0.5  # share of the steps, at the end, over which the rates fall to zero


class PromptRecipe(Section):
    train: PositiveInt = 8192
    test: PositiveInt = 512


class ActorRecipe(Section):
    seed: NonNegativeInt = 0
    model: ModelRecipe = ModelRecipe()
    problems: ProblemRecipe
    teaching: TeachingRecipe
    prompts: PromptRecipe = PromptRecipe()


def make_actor(recipe: ActorRecipe, folder: Path, notify: Notify = print) -> bool:
    """Make tokenizer, model and data/{train,test}.jsonl in `folder`, unless an equal recipe made them before.

    Returns whether they were made now. `notify` informs the user.
    """
    description = {"kind": "small actor", "revision": REVISION, **recipe.model_dump(mode="json")}
    return make_once(folder, description, lambda scratch: _make(recipe, scratch, notify))


def _make(recipe: ActorRecipe, folder: Path, notify: Notify) -> dict[str, Any]:
    define_torchvision_operators()
    began = time.perf_counter()
    torch.manual_seed(recipe.seed)
    (folder / "data").mkdir(parents=True)
    for split, stream, count in (("train", TRAINING, recipe.prompts.train), ("test", TESTING, recipe.prompts.test)):
        write_jsonl(folder / "data" / f"{split}.jsonl", (_problem(recipe, stream, i, split) for i in range(count)))
    tokenizer = train_tokenizer(
        (problem.question + "\n" + problem.answer for problem in (_problem(recipe, TEACHING, i) for i in range(3000))),
        recipe.model.vocab_size,
    )
    tokenizer.save_pretrained(folder)
    model = _new_model(recipe.model, tokenizer)
    lessons = Lessons(tokenizer, recipe.problems, recipe.teaching, lambda i: _problem(recipe, TEACHING, i), recipe.seed)
    loss = train_supervised(model, lessons, recipe.teaching, notify)
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.bfloat16 if bf16_is_quick() else torch.float32)
    test = [_problem(recipe, TESTING, i, "test") for i in range(128)]
    rate = solve_rate(model, tokenizer, recipe.problems.template, test)
    seconds = time.perf_counter() - began
    notify(f"small actor made in {seconds:.0f} s: solves {rate:.0%} of unseen problems at temperature 1")
    return {"loss": loss, "solve_rate": rate, "seconds": round(seconds, 1)}


def _problem(recipe: ActorRecipe, stream: int, index: int, split="train"):
    return make_problem(3 * recipe.seed + stream, index, recipe.problems.mix, recipe.problems.largest, split)


def _new_model(recipe: ModelRecipe, tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # For short sequences without a GPU, plain matrix products train 1.6x faster than torch's fused attention.
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)
