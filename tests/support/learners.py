"""Inputs of an online drafter without a run: samples, and the scores of a transformers model on them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from respec_trainer.capture import Captured, CapturedRow
from respec_trainer.rollout.sample import Sample
from tests.support.drafters import DRAFT_IDS

LAYERS = (0, 1, 2)


def random_samples(lengths, step: int = 0, drafter: str = "drafter-0", seed: int = 0) -> list[Sample]:
    """Return a sample for each (prompt length, response length); seven of eight tokens are in the draft vocabulary."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    samples = []
    for number, (prompt, response) in enumerate(lengths):
        drawn = DRAFT_IDS[torch.randint(len(DRAFT_IDS), (prompt + response,), generator=generator)]
        drawn[::8] = torch.randint(3, 131, drawn[::8].shape, generator=generator)
        ids, logprobs = drawn.tolist(), [-1.0] * response
        samples.append(
            Sample(
                key=f"{step}:{number}",
                prompt_ids=ids[:prompt],
                response_ids=ids[prompt:],
                sampler_logprobs=logprobs,
                finish_reason="length",
                actor_version=f"actor-{step}",
                drafter_version=drafter,
                verify_count=max(response - 2, 0),
                accept_histogram=[max(response - 3, 0), 1],
            )
        )
    return samples


@torch.no_grad()
def score(model, samples: list[Sample], temperature: float = 1.0, rows=None) -> SimpleNamespace:
    """Score the samples one by one: log-probs, and for `rows` (None: all) what `actor.infer` would capture."""
    captured, logprobs = [], torch.zeros(len(samples), max(len(s.prompt_ids) + len(s.response_ids) for s in samples))
    for number, sample in enumerate(samples):
        ids, start = torch.tensor(sample.prompt_ids + sample.response_ids), len(sample.prompt_ids)
        answer = model(ids[None], output_hidden_states=True)
        states, logits = answer.hidden_states, answer.logits[0, start - 1 : -1] / temperature
        chosen = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        logprobs[number, start : len(ids)] = chosen
        if rows is not None and number not in rows:
            continue
        features = torch.cat([states[layer + 1][0] for layer in LAYERS], -1)
        captured.append(CapturedRow(number, features, states[-1][0, start - 1 : -1], logits.logsumexp(-1)))
    tokens = torch.tensor([t for s in samples for t in s.prompt_ids + s.response_ids]).unique()
    vocabulary = model.get_input_embeddings().weight[tokens], model.get_output_embeddings().weight[DRAFT_IDS]
    return SimpleNamespace(logprobs=logprobs, captured=Captured(captured, tokens, *vocabulary))
