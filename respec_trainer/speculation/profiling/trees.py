"""Times of trees (topk > 1). The engine cannot change to one while it runs, so each is an engine of its own.

Such an engine logs nothing; its cycles are timed from outside, as a generation's time over its verify passes. Only
whole cycles are known, not their parts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from respec_trainer.config import SamplingConfig
from respec_trainer.rollout.sample import Request, Sample, SamplingParams
from respec_trainer.speculation.profiling.profile import Cell, Profile, Timing
from respec_trainer.speculation.shape import OFF, Shape

TOKENS = 36  # of each sequence


class Engine(Protocol):
    def submit(self, requests: Sequence[Request]) -> Any: ...


def tree_cells(
    engine: Engine,
    shape: Shape,
    profile: Profile,
    sampling: SamplingConfig,
    vocabulary: int,
    repeats: int,
    minutes: float,
    tell: Callable[[int, int], None],
) -> list[Cell]:
    """Cells of `shape`, in which `engine` was started, at every place where the profile has plain decoding.

    Each place is visited `repeats` times, but no repeat of all of them begins after `minutes`.
    """
    generator, began = np.random.default_rng(0), time.perf_counter()
    places = [(cell.batch, cell.context) for cell in profile.cells if cell.shape == OFF and cell.decodes]
    taken = defaultdict(list)
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > 60 * minutes:
            break
        for count, index in enumerate(generator.permutation(len(places)), 1):
            batch, context = places[index]
            prompts = generator.integers(0, vocabulary, (batch, max(context - TOKENS // 2, 1))).tolist()
            taken[batch, context].append(_cycle_seconds(engine, prompts, sampling))
            tell(repeat * len(places) + count, repeats * len(places))
    return [
        Cell(batch=batch, context=context, shape=shape, times={"cycle": Timing(seconds=found)})
        for (batch, context), found in sorted(taken.items())
    ]


def _cycle_seconds(engine: Engine, prompts: list[list[int]], sampling: SamplingConfig) -> float:
    """Of a generation whose prompts are in the cache; its first token takes about as long as a pass."""
    _generate(engine, prompts, sampling, 1)
    began = time.perf_counter()
    samples = _generate(engine, prompts, sampling, TOKENS)
    taken = time.perf_counter() - began
    return taken / (1 + sum(sample.verify_count for sample in samples) / len(samples))


def _generate(engine: Engine, prompts: list[list[int]], sampling: SamplingConfig, tokens: int) -> list[Sample]:
    how = SamplingParams(tokens, sampling.temperature, sampling.top_p, sampling.top_k, ignore_eos=True)
    requests = [Request(str(row), tuple(prompt), how) for row, prompt in enumerate(prompts)]
    return engine.submit(requests).collect()
