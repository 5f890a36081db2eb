"""Distribution of requests over the engines, so that all have about equally many tokens to process.

The expected cost of a response is its prompt's length plus the mean length of earlier responses to that prompt. For a
new prompt it is the mean over all prompts of the last phase. Which engine draws a response, and when, does not change
its distribution, which depends on its own prompt only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from respec_trainer.rollout.sample import Request, Sample

MOST = 100_000  # prompts whose mean lengths are kept, about 10 MB
NEWEST = 0.5  # weight of the newest phase in a prompt's mean, because the actor changes


@dataclass(frozen=True)
class Unit:
    """Responses that stay on one engine: `positions` of their requests in the phase, and their expected `tokens`."""

    positions: tuple[int, ...]
    tokens: float


class Dealer:
    """Keeps mean response lengths by prompt. All ranks observe the same samples, so all deal alike."""

    def __init__(self, kind: Literal["group", "spread"]):
        """`group`: responses to one prompt stay together, so an engine reads it once. `spread`: each is dealt alone."""
        self.kind = kind
        self.means: dict[str, float] = {}  # prompt -> response tokens
        self.overall = 0.0

    def observe(self, samples: Sequence[Sample]) -> None:
        """Update the mean lengths with a phase's samples."""
        lengths: dict[str, list[int]] = defaultdict(list)
        for sample in samples:
            lengths[_digest(sample.prompt_ids)].append(len(sample.response_ids))
        for prompt, found in lengths.items():
            mean = sum(found) / len(found)
            self.means[prompt] = NEWEST * mean + (1 - NEWEST) * self.means.pop(prompt, mean)
        for prompt in list(self.means)[:-MOST]:  # the prompts that were seen longest ago
            del self.means[prompt]
        self.overall = sum(map(sum, lengths.values())) / max(1, len(samples))

    def units(self, requests: Sequence[Request], engines: int) -> list[Unit]:
        """Return the units to deal, in the order of the requests. A group larger than an engine's part is split."""
        most = 1 if self.kind == "spread" else -(-len(requests) // engines)
        groups = [list(group) for _, group in groupby(range(len(requests)), lambda i: requests[i].prompt_ids)]
        parts = [tuple(group[i : i + most]) for group in groups for i in range(0, len(group), most)]
        return [Unit(part, sum(self._expect(requests[i]) for i in part)) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "overall": self.overall}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means, self.overall = dict(state["means"]), state["overall"]

    def _expect(self, request: Request) -> float:
        response = self.means.get(_digest(request.prompt_ids), self.overall)
        return len(request.prompt_ids) + min(response, request.sampling.max_new_tokens)


def deal(units: Sequence[Unit], engines: int) -> list[list[Unit]]:
    """Return one share of units for each engine, in the order given, with about equal tokens.

    The largest unit is dealt first, always to the engine that has the fewest tokens. The largest share then has at most
    4/3 of the tokens that it has in the best deal (Graham 1969). Units of equal size are interchangeable: of those,
    neighbors stay together.
    """
    loads, takers = [0.0] * engines, defaultdict(list)
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        engine = loads.index(min(loads))
        loads[engine] += unit.tokens
        takers[unit.tokens].append(engine)
    waiting = {tokens: iter(sorted(chosen)) for tokens, chosen in takers.items()}
    shares: list[list[Unit]] = [[] for _ in range(engines)]
    for unit in units:
        shares[next(waiting[unit.tokens])].append(unit)
    return shares


def begin(share: Sequence[Unit], room: int) -> tuple[list[Unit], list[Unit]]:
    """Split a share, in its order: the units to begin with and the rest. The largest begin, until they fill `room`."""
    chosen: set[Unit] = set()
    for unit in sorted(share, key=lambda unit: -unit.tokens):
        if sum(len(other.positions) for other in chosen) >= room:
            break
        chosen.add(unit)
    return [u for u in share if u in chosen], [u for u in share if u not in chosen]


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(np.array(prompt, dtype=np.int64).tobytes(), digest_size=8).hexdigest()
