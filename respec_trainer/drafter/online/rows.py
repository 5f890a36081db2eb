"""Make the rows of the replay buffer from this rank's responses of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.stored import Row, Snapshot
from respec_trainer.drafter.online.weighting import response_weights
from respec_trainer.rollout.sample import Sample


@dataclass
class StepRows:
    """This rank's rows of a step, and counts for the metrics."""

    rows: list[Row]
    fell_back: bool  # True: all weights are one, because no rewards differ, or one is infinite
    refused: int = 0  # responses left out because they were not finite
    drift: float = 0.0  # KL(actor now || actor at the last push), summed over `tokens` tokens
    tokens: int = 0


def rows_of_step(
    samples: list[Sample],
    inference: Any,
    rewards: torch.Tensor,
    config: DrafterConfig,
    rank_info: LearnerRank,
    step: int,
) -> StepRows:
    """Make this rank's rows of a step from what the actor captured.

    Responses that are empty, have values that are not finite, or were skipped by the reward are left out.

    Args:
        samples: the samples of all ranks. inference: the actor's pass over this rank's share of them.
        rewards: [prompts, n], NaN for a sample that the reward skipped.
        step: the number of the iteration.
    """
    weights, fell_back = response_weights(rewards, config.weighting, config.weight_scope)
    found = StepRows([], fell_back)
    captured = inference.captured
    if captured is None:
        return found
    snapshot = Snapshot(captured.token_ids, captured.embeddings, captured.output_rows)
    mine, scores = rank_info.rows(len(samples)), rewards.flatten()
    for part in captured.rows:
        number = mine[part.row]
        sample = samples[number]
        if not sample.response_ids or scores[number].isnan():
            continue
        if not (part.features.isfinite().all() and part.hidden.isfinite().all() and part.logsumexp.isfinite().all()):
            found.refused += 1
            continue
        found.drift += _drift(sample, inference.logprobs[part.row])
        found.tokens += len(sample.response_ids)
        found.rows.append(
            Row(
                tokens=torch.tensor([*sample.prompt_ids, *sample.response_ids]),
                features=part.features,
                hidden=part.hidden,
                logsumexp=part.logsumexp,
                snapshot=snapshot,
                weight=weights.flatten()[number].item(),
                step=step,
                passes=sample.verify_count,
            )
        )
    return found


def _drift(sample: Sample, logprobs: torch.Tensor) -> float:
    """Estimate KL(actor now || actor at the last push), summed over the tokens of a response.

    The estimate is rho log rho - rho + 1 with rho = exp(actor - sampler), for tokens drawn by the sampler: its mean is
    the divergence, and no term is negative. If every step ends with a push, only the numerical mismatch between sampler
    and actor is left. `logprobs` [S] are the actor's, over prompt and response.
    """
    start, count = len(sample.prompt_ids), len(sample.response_ids)
    sampler = torch.tensor(sample.sampler_logprobs)
    ratio = logprobs[start : start + count].cpu().double() - sampler.double()
    return (ratio.exp() * ratio - ratio.expm1()).sum().item()
