"""A drafter for any actor: sample the actor's responses, distill the drafter on most of them, measure it on the rest.

The responses come from the same engine that serves the run, without speculation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from respec_trainer.compat.precision import bf16_is_quick
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config import (
    DataConfig,
    EngineConfig,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from respec_trainer.data.prompts import Prompt, PromptSet, PromptStream, check_tokenizer_fits, load_prompts
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.distill import DistillSettings, Evaluation, distill, evaluate
from respec_trainer.drafter.divergence import LossKind
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.format import load_drafter, save_drafter
from respec_trainer.drafter.shape import VOCABULARY_MULTIPLE, DrafterShape, inverse_frequencies
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.drafter.vocabulary import LEAST_COVERAGE, coverage, draft_vocabulary
from respec_trainer.errors import ConfigError, DataError
from respec_trainer.recipes.folder import fingerprint, make_once
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

# Increase it whenever an equal recipe gives another result than before: older folders are then made again.
REVISION = 4

Notify = Callable[[str], None]
Sampler = Callable[[Sequence[Request]], list[Sample]]


class PromptFormat(Section):
    """Settings for reading prompts, with the meanings of the run's `data` section."""

    prompt_column: str = "question"
    answer_column: str = "answer"
    template: str = "{prompt}"
    max_prompt_tokens: PositiveInt = 1024


class RolloutRecipe(Section):
    prompts: PositiveInt  # number of different prompts, drawn at random from the data; all if it holds fewer
    samples_per_prompt: PositiveInt = 2
    held_out: PositiveInt = 64  # number of prompts whose responses only measure the drafter
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0  # rollout.sampling.temperature of the run that the drafter is for
    engine: EngineConfig = EngineConfig()


class TrainingRecipe(Section):
    updates: PositiveInt | None = None
    epochs: PositiveInt | None = None  # passes over the responses, instead of `updates`
    batch_size: PositiveInt = 32  # responses
    by_length: bool = True  # True: responses of similar length in a batch, less padding; False: fair samples
    unroll: PositiveInt = 5  # draft steps unrolled in training; at least as many as the engine will draft
    loss: LossKind = "kl"  # drafter/divergence.py
    decay: Fraction = 0.8
    lr: PositiveFloat = 2e-3  # AdamW: norms and the output layer, or everything if matrix_lr is null
    matrix_lr: PositiveFloat | None = 2e-2  # Muon: the drafter's other matrices
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _ends(self) -> TrainingRecipe:
        if (self.updates is None) == (self.epochs is None):
            raise ValueError("set one of updates and epochs, and leave the other out or null")
        return self

    def updates_for(self, responses: int) -> int:
        """The number of updates for `responses` responses to learn from."""
        return self.updates or self.epochs * math.ceil(responses / self.batch_size)


class DrafterRecipe(Section):
    seed: NonNegativeInt = 0
    draft_vocab: Annotated[int, Field(ge=VOCABULARY_MULTIPLE, multiple_of=VOCABULARY_MULTIPLE)]
    draft_steps: PositiveInt = 3  # draft steps for which an accept length is predicted
    prompts: PromptFormat = PromptFormat()
    rollouts: RolloutRecipe
    training: TrainingRecipe


def make_drafter(
    recipe: DrafterRecipe,
    actor: Path,
    data: Path,
    folder: Path,
    start: Path | None = None,
    notify: Notify = print,
    sampler: Sampler | None = None,
) -> bool:
    """Train a drafter for `actor` on its responses to the prompts of `data`. Returns False if it existed already.

    A folder made before by the same recipe, actor, data and start is not changed.

    Args:
        start: an existing drafter for this actor to train further, with its draft vocabulary; default: a new one.
        notify: informs the user.
        sampler: draws responses to requests; default: an engine on this machine.

    Raises ConfigError or DataError if actor, data or start cannot be used.
    """
    for path, what in ((actor, "actor"), (data, "data"), *(((start, "drafter to start from"),) if start else ())):
        if not path.exists():
            raise ConfigError(f"no {what} at {path}")
    if recipe.training.unroll < recipe.draft_steps:
        raise ConfigError(f"training.unroll={recipe.training.unroll} is less than draft_steps={recipe.draft_steps}")
    description = {
        "kind": "drafter",
        "revision": REVISION,
        "actor": fingerprint(actor),
        "data": fingerprint(data),
        "start": fingerprint(start) if start else None,
        **recipe.model_dump(mode="json"),
    }
    return make_once(folder, description, lambda out: _make(recipe, actor, data, out, start, notify, sampler))


def _make(
    recipe: DrafterRecipe, actor: Path, data: Path, out: Path, start: Path | None, notify: Notify, sampler
) -> dict:
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf_config, prompts = _read(recipe, actor, data)
    drafter, ids = _begin(recipe, hf_config, start)
    samples = (sampler or engine_sampler(recipe, actor, device))(_requests(recipe, prompts))
    held_out = recipe.rollouts.held_out * recipe.rollouts.samples_per_prompt
    unseen, seen = (_rollouts(part) for part in (samples[:held_out], samples[held_out:]))
    sampling = time.perf_counter() - began
    notify(f"{len(samples)} responses, {sum(len(s.response_ids) for s in samples)} tokens, in {sampling:.0f} s")
    if ids is None:
        ids = draft_vocabulary(seen.token_counts(hf_config.vocab_size), recipe.draft_vocab)
    drafter.to(device)
    teacher = HFTeacher(actor, ids, drafter.shape.feature_layers, device, recipe.rollouts.temperature)
    settings = _settings(recipe, device, len(seen))
    distill(drafter, teacher, seen, settings, _progress(notify, settings.updates))
    # Measure the weights as an engine will serve them: as saved, in bf16.
    save_drafter(drafter, ids, out)
    measured = evaluate(load_drafter(out, hf_config)[0].to(device), teacher, unseen, settings)
    covered = coverage(unseen.token_counts(hf_config.vocab_size), ids)
    facts = _facts(measured, covered, recipe.draft_steps, time.perf_counter() - began)
    for line in summary(facts, recipe.draft_steps):
        notify(line)
    return facts


def _begin(recipe: DrafterRecipe, hf_config, start: Path | None) -> tuple[Eagle3Drafter, torch.Tensor | None]:
    """Make the drafter to train, and its draft vocabulary if it has one; refuse errors before the costly sampling."""
    if start:
        return load_drafter(start, hf_config)
    shape = DrafterShape.for_target(hf_config, recipe.draft_vocab)
    inverse_frequencies(shape.rope, shape.head_dim)  # raises for a rope type that drafters do not support
    return Eagle3Drafter(shape, seed=recipe.seed), None


def _facts(measured: Evaluation, covered: float, steps: int, seconds: float) -> dict[str, Any]:
    return {
        "acceptance": [round(p, 4) for p in measured.top1],
        "overlap": [round(p, 4) for p in measured.alpha],
        "accept_length": round(measured.accept_length[steps - 1], 3),
        "coverage": round(covered, 4),
        "seconds": round(seconds, 1),
    }


def summary(facts: dict[str, Any], steps: int) -> list[str]:
    """The results of training as lines of text."""
    row = "  ".join(f"{p:.3f}" for p in facts["acceptance"])
    overlap = "  ".join(f"{p:.3f}" for p in facts["overlap"])
    lines = [
        f"on unseen responses, by depth 1, 2, ...:  acceptance {row}  overlap {overlap}",
        f"predicted accept length with {steps} draft steps: {facts['accept_length']:.2f} tokens a verify pass; "
        f"the draft vocabulary covers {facts['coverage']:.2%} of response tokens; {facts['seconds']:.0f} s in all",
    ]
    if facts["coverage"] < LEAST_COVERAGE:
        lines.append(
            f"WARNING: the draft vocabulary covers only {facts['coverage']:.1%} of response tokens, less than "
            f"{LEAST_COVERAGE:.0%}; the others are never drafted: raise draft_vocab, or sample more responses"
        )
    return lines


def _read(recipe: DrafterRecipe, actor: Path, data: Path) -> tuple[Any, list[Prompt]]:
    """Read the actor's config, and prompts in a seeded order, the held-out ones first."""
    define_torchvision_operators()
    from transformers import AutoConfig, AutoTokenizer

    try:
        hf_config, tokenizer = AutoConfig.from_pretrained(actor), AutoTokenizer.from_pretrained(actor)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{actor} is not a Hugging Face model folder: {error}") from error
    check_tokenizer_fits(tokenizer, hf_config, str(actor))
    columns = DataConfig(path=str(data), prompts_per_step=1, **recipe.prompts.model_dump())
    room = hf_config.max_position_embeddings - recipe.rollouts.max_new_tokens
    found: PromptSet = load_prompts(columns, tokenizer, min(recipe.prompts.max_prompt_tokens, room))
    if len(found) <= recipe.rollouts.held_out:
        raise DataError(f"{data} holds {len(found)} prompts, no more than rollouts.held_out={recipe.rollouts.held_out}")
    return hf_config, PromptStream(found, recipe.seed).next(min(recipe.rollouts.prompts, len(found)))


def _requests(recipe: DrafterRecipe, prompts: list[Prompt]) -> list[Request]:
    rollouts = recipe.rollouts
    sampling = SamplingParams(max_new_tokens=rollouts.max_new_tokens, temperature=rollouts.temperature)
    group = range(rollouts.samples_per_prompt)
    return [Request(f"{prompt.key}:{i}", prompt.ids, sampling) for prompt in prompts for i in group]


def engine_sampler(recipe: DrafterRecipe, actor: Path, device: str) -> Sampler:
    """Return a sampler that starts an SGLang engine for each call, and stops it at the end."""
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    def sample(requests: Sequence[Request]) -> list[Sample]:
        engine = recipe.rollouts.engine
        if device == "cpu" and engine.max_total_tokens is None:
            longest = max(len(request.prompt_ids) for request in requests) + recipe.rollouts.max_new_tokens + 1
            engine = engine.model_copy(update={"max_total_tokens": engine.max_running_requests * longest})
        dtype = "bf16" if device == "cuda" or bf16_is_quick() else "fp32"
        sglang = SGLangEngine(EngineSettings(str(actor), dtype=dtype, device=device, engine=engine, seed=recipe.seed))
        try:
            sglang.start()
            return sglang.submit(requests).collect()
        finally:
            sglang.shutdown()

    return sample


def _rollouts(samples: list[Sample]) -> DrafterBatch:
    return DrafterBatch.collate([(sample.prompt_ids, sample.response_ids) for sample in samples])


def _settings(recipe: DrafterRecipe, device: str, responses: int) -> DistillSettings:
    training = recipe.training
    return DistillSettings(
        updates=training.updates_for(responses),
        batch_size=training.batch_size,
        by_length=training.by_length,
        steps=training.unroll,
        loss=training.loss,
        decay=training.decay,
        lr=training.lr,
        matrix_lr=training.matrix_lr,
        weight_decay=training.weight_decay,
        bf16=device == "cuda" or bf16_is_quick(),
        temperature=recipe.rollouts.temperature,
        seed=recipe.seed,
    )


def _progress(notify: Notify, updates: int) -> Callable[[dict], None]:
    def progress(record: dict) -> None:
        if record["update"] % 50 == 0 or record["update"] == updates:
            depths = " ".join(f"{p:.3f}" for p in record["top1"])
            notify(f"update {record['update']}/{updates}  loss {record['loss']:.3f}  acceptance by depth {depths}")

    return progress
