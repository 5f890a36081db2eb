"""Measure a profile: visit every place, a (batch size, context length), several times in an engine with random steps.

The readings of each visit are saved beside the output at once: a measurement that was interrupted continues from them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from respec_trainer.config import SamplingConfig
from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.speculation.profiling.profile import Identity, Profile
from respec_trainer.speculation.profiling.readings import Reading, cells_of, read_log

Place = tuple[int, int]  # batch, context


class Engine(Protocol):
    """The methods of a RolloutEngine with random draft steps that are used here."""

    def submit(self, requests: Sequence[Request]) -> Any: ...

    def take_decode_log(self) -> DecodeLog: ...


@dataclass(frozen=True)
class Plan:
    """The measurements to make. Every visit decodes `tokens` per sequence: about `DRAWS` batches for each candidate."""

    DRAWS = 12

    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens of the prompts
    candidates: tuple[int, ...]
    repeats: int
    most_tokens: int  # limit for all prompts of a place together, so that reading them does not dominate the time
    seconds: float  # time limit: a repeat only begins if it should end in time, judged by the longest one so far

    @classmethod
    def of(
        cls, most: int, longest: int, candidates: Sequence[int], device: str, quick: bool = False, minutes: float = 9.0
    ) -> Plan:
        """Plan batch sizes that double up to `most`, and contexts up to `longest` tokens with the decoded ones.

        On a GPU, sizes just above a half, a quarter and an eighth of the most are added: between those of CUDA graphs,
        where padding shows.
        """
        candidates = tuple(candidates)
        room = longest - 2 * cls.DRAWS * len(candidates)
        if room < 48:
            raise EngineError(f"sequences of at most {longest} tokens leave no room to measure in: at least 200 needed")
        if most < 4:
            raise EngineError(f"rollout.engine.max_running_requests={most}: at least 4 needed, to see how times grow")
        batches = [most]
        while batches[0] > 1:
            batches.insert(0, batches[0] // (4 if quick and most >= 16 else 2) or 1)
        if device != "cpu":
            between = [most // part + 1 for part in ((2,) if quick else (2, 4, 8))]
            batches = sorted({*batches, *between})
        contexts = sorted({max(room // 16, 16), room} if quick else {max(room // 16, 16), max(room // 4, 32), room})
        tokens = max(8192 if device == "cpu" else 131_072, contexts[0] * most)
        return cls(tuple(batches), tuple(contexts), candidates, 1 if quick else 5, tokens, 60 * minutes)

    @property
    def places(self) -> list[Place]:
        pairs = [(batch, context) for batch in self.batches for context in self.contexts]
        return [(batch, context) for batch, context in pairs if batch * context <= self.most_tokens]

    @property
    def tokens(self) -> int:
        return self.DRAWS * len(self.candidates)


class Visits:
    """The readings so far, saved in a file beside the output. Only the same plan on the same machine continues it."""

    def __init__(self, out: Path, identity: Identity, plan: Plan):
        key = json.dumps([identity.model_dump(), plan.batches, plan.contexts, plan.candidates, plan.most_tokens])
        self.path = out.with_name(f".{out.name}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.partial")
        self.readings: dict[Place, list[Reading]] = defaultdict(list)
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                if not line.endswith("}"):
                    break  # an interrupted write left an incomplete line
                row = json.loads(line)
                self.readings[row["batch"], row["context"]].append(row["reading"])

    def add(self, place: Place, reading: Reading) -> None:
        self.readings[place].append(reading)
        row = {"batch": place[0], "context": place[1], "reading": reading}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def measure(
    engine: Engine,
    plan: Plan,
    identity: Identity,
    sampling: SamplingConfig,
    vocabulary: int,
    out: Path,
    progress: Callable[[int, int], None],
) -> Profile:
    """Make the missing measurements, and write the profile to `out` in one atomic step.

    Args:
        engine: running, with DepthSettings of mode "random" and `plan.candidates`, and no other requests.
        sampling: the run's sampling parameters; max_new_tokens is not used.
        vocabulary: its size; prompts are random tokens.
        progress: called with (visits done, visits planned).
    """
    visits, generator = Visits(out, identity, plan), np.random.default_rng(0)
    visit(engine, (plan.batches[-1], plan.contexts[0]), plan.tokens, sampling, vocabulary, generator)  # warms up
    graphs = list(engine.take_decode_log().graph_sizes)
    began, longest = time.monotonic(), 0.0
    total = plan.repeats * len(plan.places)
    for repeat in range(plan.repeats):
        started = time.monotonic()
        todo = [place for place in plan.places if len(visits.readings[place]) <= repeat]
        if repeat and todo and started - began + longest > plan.seconds:
            break
        for index in generator.permutation(len(todo)):
            visits.add(todo[index], visit(engine, todo[index], plan.tokens, sampling, vocabulary, generator))
            progress(sum(map(len, visits.readings.values())), total)
        longest = max(longest, time.monotonic() - started)
    profile = Profile(identity=identity, graph_sizes=graphs, cells=cells_of(visits.readings))
    profile.save(out)
    visits.close()
    return profile


def visit(
    engine: Engine,
    place: Place,
    tokens: int,
    sampling: SamplingConfig,
    vocabulary: int,
    generator: np.random.Generator,
) -> Reading:
    """Decode `tokens` per sequence at a place. Raises EngineError if the sequences never ran together in one batch."""
    batch, context = place
    how = SamplingParams(tokens, sampling.temperature, sampling.top_p, sampling.top_k, ignore_eos=True)
    prompts = generator.integers(0, vocabulary, (batch, context)).tolist()
    requests = [Request(f"{batch}x{context}:{row}", tuple(prompt), how) for row, prompt in enumerate(prompts)]
    engine.take_decode_log()
    engine.submit(requests).collect()
    log = engine.take_decode_log()
    reading = read_log(log, batch)
    if "0.plain" not in reading or "0.prefill" not in reading:
        raise EngineError(
            f"{batch} sequences of {context} tokens never ran together, in {len(log)} batches of at most "
            f"{max(log.batch, default=0)}: the engine has too few slots or too small a KV cache for them"
        )
    return reading
