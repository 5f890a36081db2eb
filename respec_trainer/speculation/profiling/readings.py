"""From what an engine logged to the cells of a profile.

A profile is measured in an engine that draws its steps anew for every decode batch. Everything at one place, a batch
size and a context length, is so measured in turns within seconds, and a machine that slows down slows all of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.speculation.cost import Part
from respec_trainer.speculation.profiling.profile import Cell, Timing
from respec_trainer.speculation.shape import chain

# What one visit to a place measured: seconds by steps and part, and under CONTEXT what contexts were.
Reading = dict[str, float]
CONTEXT = "context"


def read_log(log: DecodeLog, batch: int) -> Reading:
    """Of the decode batches of `batch` sequences, by keys "steps.part", and of the prompts before them.

    A plain step or a cycle is what lies between two starts, less what is done because steps change: switching states,
    catching up and, without speculation, the drafter's own pass. Of many times the lower quartile is taken: other work
    on a machine only ever adds to them, and may multiply some.
    """
    found: dict[str, list[float]] = defaultdict(list)
    decode = ~log.prefill
    whole = np.append(decode[1:], False) & decode & (log.batch == batch)  # another decode batch follows at once
    rest = log.period - log.catch_up - log.switch
    for row in np.flatnonzero(whole):
        steps = int(log.steps[row])
        if steps:
            parts = {"cycle": rest[row], "draft": log.draft[row], "verify": log.verify[row], "extend": log.extend[row]}
        else:
            parts = {"plain": rest[row] - log.extend[row], "extend": log.extend[row]}
        for part, taken in parts.items():
            found[f"{steps}.{part}"].append(taken)
        if log.caught_up[row] == batch:
            found["0.resume"].append(log.catch_up[row])
        found["0.switch"].append(log.switch[row])
        found[CONTEXT].append(log.context[row])
    contexts = found.pop(CONTEXT, [])
    done = {key: [each for each in taken if each > 0] for key, taken in found.items()}  # 0: was not done
    reading = {key: float(np.quantile(taken, 0.25)) for key, taken in done.items() if taken}
    if contexts:
        reading[CONTEXT] = statistics.mean(contexts)
    return reading | _read_prompts(log, decode)


def _read_prompts(log: DecodeLog, decode: np.ndarray) -> Reading:
    """Reading the prompts, all of them and in however many passes, which come before any decoding."""
    first = int(decode.argmax()) if decode.any() else 0
    if not first:
        return {}
    return {"0.prefill": log.start[first] - log.start[0], "0.catch_up": float(log.extend[:first].sum())}


def cells_of(readings: Mapping[tuple[int, int], Sequence[Reading]]) -> list[Cell]:
    """The cells of all places (batch, context of the prompts), a Timing's repeats being the visits.

    Cells of prompts say the prompts' context; those of decoding, which goes through some, its mean over all batch
    sizes: they differ by a few tokens, and cells of one context can be compared.
    """
    seen = defaultdict(list)
    for (_, prompt), visits in readings.items():
        seen[prompt] += [visit[CONTEXT] for visit in visits]
    cells = []
    for (batch, prompt), visits in sorted(readings.items()):
        times: dict[tuple[int, int], dict[Part, list[float]]] = defaultdict(lambda: defaultdict(list))
        for visit in visits:
            for key, taken in visit.items():
                if key != CONTEXT:
                    steps, part = key.split(".")
                    context = prompt if part in ("prefill", "catch_up") else round(statistics.mean(seen[prompt]))
                    times[context, int(steps)][part].append(taken)
        for (context, steps), found in sorted(times.items()):
            parts = {part: Timing(seconds=taken) for part, taken in found.items()}
            cells.append(Cell(batch=batch, context=context, shape=chain(steps), times=parts))
    return cells
