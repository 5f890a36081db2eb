"""Deal: which engine draws which responses, so that all have as much to do.

A response is expected to take its prompt's tokens and as many more as responses to that prompt had on average; of a
prompt not seen yet, as those to all prompts of the last phase. Which engine draws it, and when, changes no law: its
draws hang on its own prompt alone.
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

MOST = 100_000  # prompts remembered, some 10 MB
NEWEST = 0.5  # share of the newest phase in a prompt's mean: the policy moves


@dataclass(frozen=True)
class Unit:
    """Responses that one engine draws. `positions`: of their requests in the phase; `tokens`: expected, of all."""

    positions: tuple[int, ...]
    tokens: float


class Dealer:
    """Remembers lengths; every rank's is told the same samples, and so deals alike."""

    def __init__(self, kind: Literal["group", "spread"]):
        """`group`: responses to one prompt stay together: an engine reads it once. `spread`: each goes for itself."""
        self.kind = kind
        self.means: dict[str, float] = {}  # prompt -> response tokens
        self.overall = 0.0

    def observe(self, samples: Sequence[Sample]) -> None:
        """Learn from a phase's samples."""
        lengths: dict[str, list[int]] = defaultdict(list)
        for sample in samples:
            lengths[_digest(sample.prompt_ids)].append(len(sample.response_ids))
        for prompt, found in lengths.items():
            mean = sum(found) / len(found)
            self.means[prompt] = NEWEST * mean + (1 - NEWEST) * self.means.pop(prompt, mean)
        for prompt in list(self.means)[:-MOST]:  # those not seen for longest
            del self.means[prompt]
        self.overall = sum(map(sum, lengths.values())) / max(1, len(samples))

    def units(self, requests: Sequence[Request], engines: int) -> list[Unit]:
        """What is dealt as one, in the order of the requests. A group is cut where it is more than an engine's part."""
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
    """Shares of about equal tokens, each in the order given: the largest unit first, to whoever has least.

    The fullest share is at most 4/3 as full as in the best deal (Graham 1969). Units that are alike are
    interchangeable: of those, neighbors stay together.
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
    """What of a share to begin with, in its order, and the rest: the largest units begin, until they fill `room`."""
    chosen: set[Unit] = set()
    for unit in sorted(share, key=lambda unit: -unit.tokens):
        if sum(len(other.positions) for other in chosen) >= room:
            break
        chosen.add(unit)
    return [u for u in share if u in chosen], [u for u in share if u not in chosen]


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(np.array(prompt, dtype=np.int64).tobytes(), digest_size=8).hexdigest()
