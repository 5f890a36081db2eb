"""What an online drafter stores of a step: this rank's responses as rows of the replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.online.buffer import Row, Snapshot
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.weighting import response_weights
from respec_trainer.rollout.sample import Sample


@dataclass
class StepRows:
    """This rank's rows of a step, and what was found while they were made."""

    rows: list[Row]
    fell_back: bool  # whether all weights are one because the rewards tell nothing apart
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
    """Make this rank's rows of a step as the actor captured them.

    Left out are responses that are empty, not finite, or skipped by the reward.

    Args:
        samples: of all ranks. inference: the actor's pass over this rank's share of them.
        rewards: [prompts, n], NaN for a sample that the reward skipped.
        step: number of the iteration, for the rows.
    """
    weights, fell_back = response_weights(rewards, config.weighting, config.weight_scope)
    found = StepRows([], fell_back)
    captured = inference.captured
    if captured is None:
        return found
    snapshot = Snapshot(captured.token_ids, captured.embeddings, captured.output_rows)
    first, scores = rank_info.dp_rank * (len(samples) // rank_info.dp), rewards.flatten()
    for part in captured.rows:
        sample = samples[first + part.row]
        if not sample.response_ids or scores[first + part.row].isnan():
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
                weight=weights.flatten()[first + part.row].item(),
                step=step,
                passes=sample.verify_count,
            )
        )
    return found


def _drift(sample: Sample, logprobs: torch.Tensor) -> float:
    """Estimate KL(actor now || actor at the last push), summed over the tokens of a response.

    It is rho log rho - rho + 1 with rho = exp(actor - sampler), over draws of the sampler: it has the divergence as its
    mean, and no negative terms. While every step is followed by a push it is the mismatch between sampler and actor
    alone. `logprobs` [S] are the actor's of prompt and response.
    """
    start, count = len(sample.prompt_ids), len(sample.response_ids)
    sampler = torch.tensor(sample.sampler_logprobs)
    ratio = logprobs[start : start + count].cpu().double() - sampler.double()
    return (ratio.exp() * ratio - ratio.expm1()).sum().item()
