"""Measure the share of word problems that a model solves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from respec_trainer.data.word_problems import MARKER, Problem
from respec_trainer.rewards.exact import exact_answer_reward

NEW_TOKENS = 96  # of a response


@torch.no_grad()
def solve_rate(model, tokenizer, template: str, problems: Sequence[Problem]) -> float:
    """Sample one response to each of `problems` with transformers at temperature 1; return the share that is right."""
    texts = [template.replace("{prompt}", problem.question) for problem in problems]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    tokens = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
    )
    responses = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = [
        exact_answer_reward(response, problem.answer, MARKER)
        for response, problem in zip(responses, problems, strict=True)
    ]
    return sum(rewards) / len(rewards)
