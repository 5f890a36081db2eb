"""Policies: how many draft steps the next decode batch takes. Chains only, which the engine can switch while it runs.

A policy is asked before every decode batch, inside the engine too: it looks up times in tables and does some tens of
floating-point operations in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from respec_trainer.rollout.decode_log import DepthSettings, check_candidates
from respec_trainer.speculation.cost import CostModel, Work, seconds
from respec_trainer.speculation.shape import chain


class DepthPolicy(Protocol):
    """What the simulator asks; `scheduler.DepthScheduler` is one that also runs in the engine."""

    # Whether `tell` gives it the acceptance as it is and it switches at no cost; else it observes, and pays.
    informed: bool

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Draft steps for `batch` sequences of `context` tokens on average; 0 is plain decoding.

        `missed` is the mean number of tokens of a sequence that its drafter has not read.
        """

    def observe(self, steps: int, batch: int, survivors: Sequence[int]) -> None:
        """What came of it: survivors[d] sequences kept at least d + 1 drafts."""


class FixedPolicy:
    """Always the same steps; 0 is speculation off."""

    informed = False

    def __init__(self, steps: int):
        self.steps = steps

    def choose(self, batch: int, context: float, missed: float) -> int:
        return self.steps

    def observe(self, steps: int, batch: int, survivors: Sequence[int]) -> None:
        pass


class ThresholdPolicy(FixedPolicy):
    """The same steps up to a batch size, and none above it: the tables that engines ship, with one row."""

    def __init__(self, steps: int, largest: int):
        super().__init__(steps)
        self.largest = largest

    @classmethod
    def of(cls, settings: DepthSettings) -> ThresholdPolicy:
        """For an engine: `fixed` steps in batches of at most `max_batch`."""
        return cls(settings.fixed, settings.max_batch)

    def predicted(self) -> float:
        return 0.0  # it expects nothing

    def choose(self, batch: int, context: float, missed: float) -> int:
        return self.steps if batch <= self.largest else 0


class OraclePolicy(FixedPolicy):
    """The fastest choice at every moment by the true costs and the true acceptance, switching at no cost."""

    informed = True

    def __init__(self, costs: CostModel, candidates: Sequence[int]):
        self.costs, self.candidates = costs, tuple(candidates)
        self.acceptance: Sequence[float] = ()

    def tell(self, acceptance: Sequence[float]) -> None:
        """acceptance[d]: probability that the draft at depth d + 1 is kept, given that those before it were."""
        self.acceptance = acceptance

    def choose(self, batch: int, context: float, missed: float) -> int:
        tokens = tokens_by_steps(self.candidates, self.acceptance)
        taken = [self.costs.cycle_seconds(chain(steps), batch, context) for steps in self.candidates]
        return self.candidates[min(range(len(tokens)), key=lambda i: taken[i] / tokens[i])]


class StepTimes:
    """The cost model's times of a chain's cycle in a table, and of what changing to it takes.

    Args:
        costs: seconds by batch and context; where it knows no catch-up, that is free.
        candidates: draft steps to choose from, rising; 0 is plain decoding.
        max_batch: sequences an engine runs at most.
        max_context: tokens a sequence has at most; a longer one counts as this long.
    """

    def __init__(self, costs: CostModel, candidates: Sequence[int], max_batch: int, max_context: int):
        check_candidates(candidates)
        self.candidates = tuple(candidates)
        self.max_batch, self.max_context = max_batch, max_context
        places = range(place_of(max_context) + 1)
        batch, context = np.meshgrid(np.arange(1.0, max_batch + 1), [middle_of(p) for p in places], indexing="ij")
        by_steps = [costs.cycle_seconds(chain(steps), batch, context) for steps in candidates]
        self.cycles = np.stack(by_steps, -1).tolist()  # [batch - 1][place][candidate]
        self.switch = costs.switch_seconds()
        self.reading = costs.to_tuples().get("catch_up")

    def at(self, batch: int, context: float) -> list[float]:
        """Seconds of each candidate's cycle."""
        return self.cycles[min(batch, self.max_batch) - 1][place_of(min(int(context), self.max_context))]

    def catch_up(self, batch: int, context: float, missed: float) -> float:
        """Seconds until the drafter has read what it missed."""
        if missed <= 0 or self.reading is None:
            return 0.0
        return seconds(self.reading, Work.reading(batch, context, min(missed, context)))


class AdaptivePolicy:
    """The fastest choice by the cost model, once changing to it has become worth its price.

    Every batch adds what it loses against each other choice: the seconds it takes less those in which the other would
    make the same tokens. The policy changes when the best choice's account has reached the price of changing to it, so
    changing never costs more in all than staying has: the rule of renting until the rent has paid for the skis (Karlin
    et al. 1988). Where changing is free it takes the best at once.

    Going off costs a switch, and going on besides that the drafter reads what it has missed since. Most of that price
    is no loss: the drafter has saved as much by not reading. And responses that have gone on for long go on for long,
    so that there is something to believe about the future: if speculation would win its price within as many tokens as
    were missed, a `TRUST` of the price is waited for, else 1 / TRUST of it (ski rental with a prediction: Purohit,
    Svitkina and Kumar 2018, who bound what a wrong one costs by 1 + 1 / TRUST times the best in hindsight).
    """

    TRUST = 0.5

    def __init__(self, times: StepTimes):
        self.times = times
        self.current: int | None = None  # place among the candidates
        self.lost = [0.0] * len(times.candidates)

    def choose(self, batch: int, context: float, missed: float, tokens: Sequence[float]) -> int:
        """The place of the choice among the candidates, by which a sequence is expected to gain so many `tokens`."""
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

    def change(self, place: int) -> None:
        """Go on with the candidate at this place, all accounts settled."""
        self.current, self.lost = place, [0.0] * len(self.lost)


def tokens_by_steps(candidates: Sequence[int], acceptance: Sequence[float]) -> list[float]:
    """Expected tokens a sequence gains with each number of steps, which must rise."""
    tokens, survival, depth, last = 1.0, 1.0, 0, len(acceptance) - 1
    found = []
    for steps in candidates:
        while depth < steps:
            survival *= acceptance[depth if depth < last else last]
            tokens += survival
            depth += 1
        found.append(tokens)
    return found


def place_of(context: int) -> int:
    """Of a context length in the tables: one place a token up to 8, then four an octave."""
    octave = max(context.bit_length() - 3, 0)
    return 4 * octave + (context >> octave)


def middle_of(place: int) -> float:
    """The middle of the contexts at a place."""
    if place < 8:
        return float(max(place, 1))
    octave, quarter = place // 4 - 1, place % 4
    return (4 + quarter + 0.5) * 2.0**octave - 0.5
