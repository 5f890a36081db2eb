"""Policies: how many draft steps the next decode batch takes. Chains only, which the engine can switch while it runs.

`choose` is called before every decode batch, inside the engine too: it looks up times in tables and does some tens of
floating-point operations in plain Python.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.shape import chain


class Policy(Protocol):
    # Whether it is told the acceptance as it is, and switches at no cost; else what was seen of it, and pays.
    informed: bool

    def choose(self, batch: int, context: int, acceptance: Sequence[float]) -> int:
        """Draft steps for `batch` sequences of `context` tokens on average; 0 is plain decoding.

        `acceptance[d]` is the probability that the draft at depth d + 1 is kept, given that those before it were.
        """


class FixedPolicy:
    """Always the same steps; 0 is speculation off."""

    informed = False

    def __init__(self, steps: int):
        self.steps = steps

    def choose(self, batch: int, context: int, acceptance: Sequence[float]) -> int:
        return self.steps


class OraclePolicy:
    """The fastest choice at every moment by the true costs and the true acceptance, switching at no cost."""

    informed = True

    def __init__(self, costs: CostModel, candidates: Sequence[int]):
        self.costs, self.candidates = costs, tuple(candidates)

    def choose(self, batch: int, context: int, acceptance: Sequence[float]) -> int:
        tokens = tokens_by_steps(self.candidates, acceptance)
        seconds = [self.costs.cycle_seconds(chain(steps), batch, context) for steps in self.candidates]
        return self.candidates[min(range(len(tokens)), key=lambda i: seconds[i] / tokens[i])]


class AdaptivePolicy:
    """The fastest choice by a cost model, once changing to it has become worth its price.

    Every step adds what it loses against each other choice: the seconds it takes less those in which the other would
    make the same tokens. The policy changes when the best choice's account has reached the price of changing to it, so
    changing never costs more in all than staying has: the rule of renting until the rent has paid for the skis (Karlin
    et al. 1988). It assumes nothing of how the batch goes on, and where changing is free takes the best at once.

    Speculation going off and on again costs one catch-up. Each way is priced at half of it: with the whole price on one
    side, the policy would leave speculation at the slightest doubt.

    Args:
        costs: seconds by batch and context; where it knows no catch-up, that is free.
        candidates: draft steps to choose from, rising; 0 is plain decoding.
        max_batch: sequences an engine runs at most.
        max_context: tokens a sequence has at most; a longer one counts as this long.
        switch_seconds: what any change of the steps takes, besides.
    """

    informed = False

    def __init__(
        self, costs: CostModel, candidates: Sequence[int], max_batch: int, max_context: int, switch_seconds: float = 0.0
    ):
        if not candidates or sorted(set(candidates)) != list(candidates) or candidates[0] < 0:
            raise ConfigError(f"candidate steps must rise from 0 or more, not {list(candidates)}")
        self.candidates = tuple(candidates)
        self.max_batch, self.max_context = max_batch, max_context
        places = range(place_of(max_context) + 1)
        batch, context = np.meshgrid(np.arange(1.0, max_batch + 1), [middle_of(p) for p in places], indexing="ij")
        by_steps = [costs.cycle_seconds(chain(steps), batch, context) for steps in candidates]
        self.seconds = np.stack(by_steps, -1).tolist()  # [batch - 1][place][candidate]
        catch_up = costs.catch_up_seconds(batch, context) if costs.has("catch_up") else 0 * batch
        self.price = switch_seconds  # of changing the steps
        self.price_off = (switch_seconds + catch_up / 2).tolist()  # [batch - 1][place], of going on or off
        self.reset()

    def fresh(self) -> AdaptivePolicy:
        """Another policy with the same tables, before its first choice."""
        other = copy.copy(self)
        other.reset()
        return other

    def reset(self) -> None:
        """For the next rollout: the first choice is free."""
        self.current: int | None = None
        self.lost = [0.0] * len(self.candidates)

    def choose(self, batch: int, context: int, acceptance: Sequence[float]) -> int:
        row = min(batch, self.max_batch) - 1
        place = place_of(min(context, self.max_context))
        seconds, tokens = self.seconds[row][place], tokens_by_steps(self.candidates, acceptance)
        paces = [taken / made for taken, made in zip(seconds, tokens, strict=True)]
        best = paces.index(min(paces))
        if self.current is None:
            self.current = best
        if best != self.current:
            crosses = not (self.candidates[self.current] and self.candidates[best])
            if self.lost[best] >= (self.price_off[row][place] if crosses else self.price):
                self.current, self.lost = best, [0.0] * len(self.lost)
        now, made = seconds[self.current], tokens[self.current]
        self.lost = [max(0.0, lost + now - made * pace) for lost, pace in zip(self.lost, paces, strict=True)]
        return self.candidates[self.current]


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
