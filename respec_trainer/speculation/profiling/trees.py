"""Measure trees (topk > 1). The engine cannot switch to a tree while it runs, so each needs an engine of its own.

Such an engine has no decode log. The time of a cycle is the time of a generation divided by its verify passes, so only
whole cycles are measured, not their parts.
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

TOKENS = 36  # decoded tokens of each sequence


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
    progress: Callable[[int, int], None],
) -> list[Cell]:
    """Measure the cells of `shape`, with which `engine` was started, wherever the profile has plain decoding.

    Each (batch size, context length) is measured `repeats` times, but no repeat begins after `minutes`.

    Args:
        progress: called with (measurements done, measurements planned).
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
            progress(repeat * len(places) + count, repeats * len(places))
    return [
        Cell(batch=batch, context=context, shape=shape, times={"cycle": Timing(seconds=found)})
        for (batch, context), found in sorted(taken.items())
    ]


def _cycle_seconds(engine: Engine, prompts: list[list[int]], sampling: SamplingConfig) -> float:
    """Seconds of one cycle of a generation whose prompts are cached; its first token takes about as long as a cycle."""
    _generate(engine, prompts, sampling, 1)
    began = time.perf_counter()
    samples = _generate(engine, prompts, sampling, TOKENS)
    taken = time.perf_counter() - began
    return taken / (1 + sum(sample.verify_count for sample in samples) / len(samples))


def _generate(engine: Engine, prompts: list[list[int]], sampling: SamplingConfig, tokens: int) -> list[Sample]:
    how = SamplingParams(tokens, sampling.temperature, sampling.top_p, sampling.top_k, ignore_eos=True)
    requests = [Request(str(row), tuple(prompt), how) for row, prompt in enumerate(prompts)]
    return engine.submit(requests).collect()
