"""Policies: they choose the number of draft steps of the next decode batch.

They choose among chains only, because the engine can switch between chains while it runs. A policy is called before
every decode batch, also inside the engine: it looks up times in tables and does a few dozen floating-point operations
in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from respec_trainer.rollout.decode_log import DepthSettings, check_candidates
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.cost import CostModel, Work, seconds
from respec_trainer.speculation.shape import chain


class FixedPolicy:
    """Always the same number of draft steps; 0 is speculation off."""

    def __init__(self, steps: int):
        self.steps = steps

    def choose(self, batch: int, context: float, missed: float) -> int:
        return self.steps

    def observe(self, steps: int, batch: int, survivors: Sequence[float], ends: Ends | None = None) -> None:
        pass


class ThresholdPolicy(FixedPolicy):
    """A fixed number of draft steps up to a batch size, and none above it: a one-row form of the tables in engines."""

    def __init__(self, steps: int, largest: int):
        super().__init__(steps)
        self.largest = largest

    @classmethod
    def of(cls, settings: DepthSettings) -> ThresholdPolicy:
        """Make an engine's policy: `fixed` steps in batches of at most `max_batch`."""
        return cls(settings.fixed, settings.max_batch)

    def predicted(self) -> float:
        return 0.0  # it predicts no speed-up

    def choose(self, batch: int, context: float, missed: float) -> int:
        return self.steps if batch <= self.largest else 0


class StepTimes:
    """A table of the cost model's times of each chain's cycle, and the times of changing to another chain.

    A batch between two sizes of CUDA graphs has the times of the larger graph, whose padding it computes too.

    Args:
        costs: seconds by batch and context; catching up costs nothing if the model has no times of it.
        candidates: numbers of draft steps to choose from, in rising order; 0 is plain decoding.
        max_batch: the largest number of sequences that an engine runs.
        max_context: the largest number of tokens of a sequence; a longer sequence counts as this long.
    """

    def __init__(self, costs: CostModel, candidates: Sequence[int], max_batch: int, max_context: int):
        check_candidates(candidates)
        self.costs, self.candidates = costs, tuple(candidates)
        self.max_batch, self.max_context = max_batch, max_context
        middles = [middle_of(index) for index in range(index_of(max_context) + 1)]
        batch, context = np.meshgrid(np.arange(1.0, max_batch + 1), middles, indexing="ij")
        by_steps = [costs.cycle_seconds(chain(steps), batch, context) for steps in candidates]
        self.cycles = np.stack(by_steps, -1).tolist()  # [batch - 1][index of the context][candidate]
        self.switch = costs.switch_seconds()
        self.reading = costs.to_tuples().get("catch_up")

    def with_graphs(self, graphs: Sequence[int]) -> StepTimes:
        """Return the table of an engine whose CUDA graphs have these batch sizes."""
        if tuple(graphs) == self.costs.graphs:
            return self
        return StepTimes(replace(self.costs, graphs=tuple(graphs)), self.candidates, self.max_batch, self.max_context)

    def at(self, batch: int, context: float) -> list[float]:
        """Return the seconds of each candidate's cycle."""
        return self.cycles[min(batch, self.max_batch) - 1][index_of(min(int(context), self.max_context))]

    def catch_up(self, batch: int, context: float, missed: float) -> float:
        """Return the seconds that the drafter needs to read the tokens that it missed."""
        if missed <= 0 or self.reading is None:
            return 0.0
        return seconds(self.reading, Work.reading(batch, context, min(missed, context)))


class AdaptivePolicy:
    """The fastest choice by the cost model, taken when the time lost without it has reached the cost of the change.

    For each candidate the policy sums the time lost by not using it: the seconds of each batch, less the seconds in
    which that candidate would make the same tokens. The policy changes to the best candidate when its sum reaches the
    cost of the change. So all changes together never cost more than staying has cost: the ski-rental rule (Karlin et
    al. 1988). If a change is free, the policy takes the best candidate at once.

    Every change costs a switch. Turning speculation on also costs a catch-up: the drafter reads the tokens that it
    missed. Most of this is no real loss, because the drafter saved that time while speculation was off. A prediction
    helps as well: a response that has been long so far is likely to continue for long. If speculation would win back
    its cost within as many tokens as were missed, the policy waits for `TRUST` times the cost, otherwise for 1 / TRUST
    times the cost (ski rental with a prediction: Purohit, Svitkina and Kumar 2018, who bound the cost of a wrong
    prediction by 1 + 1 / TRUST times the best choice in hindsight).
    """

    TRUST = 0.5

    def __init__(self, times: StepTimes):
        self.times = times
        self.current: int | None = None  # index among the candidates
        self.lost = [0.0] * len(times.candidates)

    def choose(self, batch: int, context: float, missed: float, tokens: Sequence[float]) -> int:
        """Return the index of the chosen candidate. tokens[i]: expected tokens a sequence gains with candidate i."""
        candidates, taken = self.times.candidates, self.times.at(batch, context)
        paces = [each / made for each, made in zip(taken, tokens, strict=True)]
        best = paces.index(min(paces))
        if self.current is None:
            self.current = best
        if best != self.current:
            price = self.times.switch
            if not candidates[self.current] and missed > 0:
                price += self.times.catch_up(batch, context, missed)
                likely = missed * (paces[self.current] - paces[best]) >= price
                price *= self.TRUST if likely else 1 / self.TRUST
            if self.lost[best] >= price:
                self.change(best)
        now, made = taken[self.current], tokens[self.current]
        self.lost = [max(0.0, lost + now - made * pace) for lost, pace in zip(self.lost, paces, strict=True)]
        return self.current

    def change(self, index: int) -> None:
        """Change to the candidate at this index, and set all sums of lost time to 0."""
        self.current, self.lost = index, [0.0] * len(self.lost)


def tokens_by_steps(candidates: Sequence[int], acceptance: Sequence[float]) -> list[float]:
    """Return the expected tokens that a sequence gains with each number of draft steps, given in rising order."""
    tokens, survival, depth, last = 1.0, 1.0, 0, len(acceptance) - 1
    found = []
    for steps in candidates:
        while depth < steps:
            survival *= acceptance[depth if depth < last else last]
            tokens += survival
            depth += 1
        found.append(tokens)
    return found


def index_of(context: int) -> int:
    """Return the index of a context length in the tables: one index per token up to 8, then four per octave."""
    octave = max(context.bit_length() - 3, 0)
    return 4 * octave + (context >> octave)


def middle_of(index: int) -> float:
    """Return the middle of the context lengths that share an index."""
    if index < 8:
        return float(max(index, 1))
    octave, quarter = index // 4 - 1, index % 4
    return (4 + quarter + 0.5) * 2.0**octave - 0.5
