"""StepRecord: the metrics of one step of an online drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from respec_trainer.config import Config
from respec_trainer.drafter.loss import DepthSums
from respec_trainer.drafter.online.measure import Measurement
from respec_trainer.drafter.online.rows import StepRows
from respec_trainer.drafter.online.stored import Row
from respec_trainer.drafter.online.updates import DrafterUpdates, Outcome
from respec_trainer.drafter.vocabulary import LEAST_COVERAGE, coverage
from respec_trainer.rollout.sample import Sample, accept_length


class StepRecord:
    """Adds up one step's metrics."""

    def __init__(self, draft_ids: torch.Tensor, vocab_size: int):
        self.draft_ids, self.vocab_size = draft_ids, vocab_size
        self.iteration = 0  # iteration of the newest rollouts, counted from 1
        self.learned_from: dict[str, int] = {}  # drafter version -> newest iteration it learned from; not the first one
        self.warned_coverage = False
        self.accept_length = 1.0
        self._clear()

    def _clear(self) -> None:
        self.steps: dict[str, float] = {}  # metrics that are equal on every rank
        self.drift = [0.0, 0.0]  # sum of the drift over this rank's tokens, and their number
        self.lengths = [0.0] * 4  # tokens and number of this rank's responses asked to be kept, and of those kept
        self.measured: Measurement | None = None
        self.measured_frozen: Measurement | None = None  # the drafter that the run began with, on the same rows
        self.exposed = 0.0
        self.updates = self.dropped = self.refused = 0
        self.loss = 0.0
        self.sums: DepthSums | None = None

    def store(self, found: StepRows, kept: Sequence[Row]) -> None:
        """Count a step, and add up what was found while its rows were made, and how long those are that were kept."""
        self.iteration += 1
        for place, rows in ((0, found.rows), (2, kept)):
            self.lengths[place] += sum(row.response for row in rows)
            self.lengths[place + 1] += len(rows)
        self.steps["drafter/uniform_fallback"] = int(found.fell_back)
        self.refused += found.refused
        self.drift[0] += found.drift
        self.drift[1] += found.tokens

    def observe(self, samples: list[Sample], notify: Callable[[str], None]) -> None:
        """Compute the metrics that need only a step's samples, and warn once of low coverage."""
        tokens = torch.tensor([token for sample in samples for token in sample.response_ids], dtype=torch.int64)
        covered = coverage(tokens.bincount(minlength=self.vocab_size), self.draft_ids)
        if covered < LEAST_COVERAGE and not self.warned_coverage:
            self.warned_coverage = True
            notify(
                f"the draft vocabulary covers only {covered:.1%} of response tokens, the others can never be drafted: "
                "train a drafter on newer responses, or with a larger draft vocabulary (tools/train_drafter.py)"
            )
        seen = [self.learned_from.get(version, 0) for version in {sample.drafter_version for sample in samples}]
        self.steps |= {"drafter/coverage": covered, "drafter/staleness": self.iteration - min(seen, default=0)}
        self.accept_length = accept_length(samples)

    def outcome(self, outcome: Outcome, updates: DrafterUpdates) -> None:
        self.dropped += not outcome.finite
        if outcome.applied:
            self.updates += 1
            self.loss += outcome.loss
            self.sums = updates.sums() if self.sums is None else self.sums + updates.sums()

    def overflowed(self) -> None:
        """Count this step's updates as dropped: they made weights that are not finite, and were undone."""
        self.dropped += self.updates
        self.updates, self.loss, self.sums = 0, 0.0, None

    def trained(self, version: str) -> None:
        self.learned_from = dict(list(self.learned_from.items())[-16:]) | {version: self.iteration}

    def metrics(self, config: Config, add: Callable, least: Callable) -> dict[str, float | list[float]]:
        """The metrics since the last call; `add` and `least` reduce lists of numbers over all ranks."""
        none = Measurement.none(config.drafter.unroll)
        measured = torch.stack([(one or none).flat() for one in (self.measured, self.measured_frozen)])
        *totals, drift, tokens, refused = add([*measured.flatten().tolist(), *self.drift, self.refused])
        asked, asked_rows, kept, kept_rows = add(self.lengths)
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
        found |= {"drafter/asked_length": asked / asked_rows} if asked_rows else {}
        found |= {"drafter/kept_length": kept / kept_rows} if kept_rows else {}
        found |= served.metrics(config)
        predicted = frozen.metrics(config).get("drafter/predicted_accept_length")
        found |= {} if predicted is None else {"drafter/frozen_accept_length": predicted}
        self._clear()
        return found
