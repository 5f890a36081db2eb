"""What an online drafter stores of a step, and what it tells of it: rows for the buffer, metrics for the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from respec_trainer.config import Config, DrafterConfig
from respec_trainer.drafter.loss import DepthSums
from respec_trainer.drafter.online.buffer import Row, Snapshot
from respec_trainer.drafter.online.measure import Measurement
from respec_trainer.drafter.online.updates import DrafterUpdates, Outcome
from respec_trainer.drafter.online.weighting import response_weights
from respec_trainer.drafter.vocabulary import coverage
from respec_trainer.rollout.sample import Sample

LEAST_COVERAGE = 0.9  # of response tokens by the draft vocabulary, below which the user is told


@dataclass(frozen=True)
class LearnerRank:
    """Of a rank: which of `dp` shares of a step's samples it scores, on which device it learns."""

    rank: int = 0
    world_size: int = 1
    dp: int = 1
    dp_rank: int = 0
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, topology) -> LearnerRank:
        return cls(topology.rank, topology.world_size, topology.dp, topology.dp_rank, topology.device)


class StepRecord:
    """Adds up one step's metrics."""

    def __init__(self, draft_ids: torch.Tensor, vocab_size: int):
        self.draft_ids, self.vocab_size = draft_ids, vocab_size
        self.iteration = 0  # of the newest rollouts, counted from 1
        self.learned_from: dict[str, int] = {}  # the newest that a drafter version has seen; nothing for the first one
        self.told_coverage = False
        self.accept_length = 1.0
        self._clear()

    def _clear(self) -> None:
        self.steps: dict[str, float] = {}  # metrics that every rank knows
        self.drift = [0.0, 0.0]  # sum over this rank's tokens, tokens
        self.measured: Measurement | None = None
        self.measured_frozen: Measurement | None = None  # the drafter that the run began with, on the same rows
        self.exposed = 0.0
        self.updates = self.dropped = self.refused = 0
        self.loss = 0.0
        self.sums: DepthSums | None = None

    def observe(self, samples: list[Sample], say: Callable[[str], None]) -> None:
        """Note what follows from a step's samples alone."""
        tokens = torch.tensor([token for sample in samples for token in sample.response_ids], dtype=torch.int64)
        covered = coverage(tokens.bincount(minlength=self.vocab_size), self.draft_ids)
        if covered < LEAST_COVERAGE and not self.told_coverage:
            self.told_coverage = True
            say(
                f"the draft vocabulary covers only {covered:.1%} of response tokens, the others can never be drafted: "
                "train a drafter on newer responses, or with a larger draft vocabulary (tools/train_drafter.py)"
            )
        seen = [self.learned_from.get(version, 0) for version in {sample.drafter_version for sample in samples}]
        self.steps |= {"drafter/coverage": covered, "drafter/staleness": self.iteration - min(seen, default=0)}
        passes = sum(sample.verify_count for sample in samples)
        drafts = sum(depth * count for sample in samples for depth, count in enumerate(sample.accept_histogram))
        self.accept_length = 1.0 + drafts / passes if passes else 1.0

    def outcome(self, outcome: Outcome, updates: DrafterUpdates) -> None:
        self.dropped += not outcome.finite
        if outcome.applied:
            self.updates += 1
            self.loss += outcome.loss
            self.sums = updates.sums() if self.sums is None else self.sums + updates.sums()

    def overflowed(self) -> None:
        """The updates so far made weights that are not finite, and were undone."""
        self.dropped += self.updates
        self.updates, self.loss, self.sums = 0, 0.0, None

    def trained(self, version: str) -> None:
        self.learned_from = dict(list(self.learned_from.items())[-16:]) | {version: self.iteration}

    def metrics(self, config: Config, add: Callable, least: Callable) -> dict[str, float | list[float]]:
        """Metrics since the last call; `add` and `least` reduce lists of numbers over all ranks."""
        none = Measurement.none(config.drafter.unroll)
        measured = torch.stack([(one or none).flat() for one in (self.measured, self.measured_frozen)])
        *totals, drift, tokens, refused = add([*measured.flatten().tolist(), *self.drift, self.refused])
        served, frozen = (Measurement.of_flat(total) for total in torch.tensor(totals, dtype=torch.float64).view(2, -1))
        (exposed,) = least([self.exposed])
        found = self.steps | {
            "drafter/updates": self.updates,
            "drafter/dropped": self.dropped,
            "drafter/refused_rows": refused,
            "drafter/drift": drift / max(tokens, 1),
            "time/learn_exposed": exposed,
        }
        if self.updates:
            found["drafter/loss"] = self.loss / self.updates
            means = self.sums.means()
            found |= {"drafter/train_acceptance": means["alpha"], "drafter/train_top1": means["top1"]}
        found |= served.metrics(config)
        predicted = frozen.metrics(config).get("drafter/predicted_accept_length")
        found |= {} if predicted is None else {"drafter/frozen_accept_length": predicted}
        self._clear()
        return found


def rows_of_step(
    samples: list[Sample],
    inference: Any,
    rewards: torch.Tensor,
    config: DrafterConfig,
    place: LearnerRank,
    record: StepRecord,
) -> list[Row]:
    """This rank's rows of a step, as the actor captured them.

    Left out are rows without tokens, rows that are not finite, and rows whose reward is NaN, which the reward skipped.

    Notes in `record` the drift KL(actor now || actor at the last push), estimated by rho log rho - rho + 1 with
    rho = exp(actor - sampler), over draws of the sampler: it has that mean, and no negative terms. While every step is
    followed by a push it is the mismatch between sampler and actor alone.
    """
    record.iteration += 1
    weights, fell_back = response_weights(rewards, config.weighting, config.weight_scope)
    record.steps["drafter/uniform_fallback"] = int(fell_back)
    captured = inference.captured
    if captured is None:
        return []
    snapshot = Snapshot(captured.token_ids, captured.embeddings, captured.output_rows)
    first = place.dp_rank * (len(samples) // place.dp)
    rows = []
    for part in captured.rows:
        sample = samples[first + part.row]
        count, reward = len(sample.response_ids), rewards.flatten()[first + part.row].item()
        if not count or math.isnan(reward):
            continue
        if not (part.features.isfinite().all() and part.hidden.isfinite().all() and part.logsumexp.isfinite().all()):
            record.refused += 1
            continue
        start = len(sample.prompt_ids)
        sampler = torch.tensor(sample.sampler_logprobs)
        ratio = inference.logprobs[part.row, start : start + count].cpu().double() - sampler.double()
        record.drift[0] += (ratio.exp() * ratio - ratio.expm1()).sum().item()
        record.drift[1] += count
        rows.append(
            Row(
                tokens=torch.tensor([*sample.prompt_ids, *sample.response_ids]),
                features=part.features,
                hidden=part.hidden,
                logsumexp=part.logsumexp,
                sampler_logprobs=sampler,
                snapshot=snapshot,
                weight=weights.flatten()[first + part.row].item(),
                reward=reward,
                actor_version=sample.actor_version,
                drafter_version=sample.drafter_version,
                step=record.iteration,
                passes=sample.verify_count,
            )
        )
    return rows
