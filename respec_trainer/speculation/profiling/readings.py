"""Turn the decode log of an engine into the cells of a profile.

A profile is measured in an engine that draws the number of draft steps at random for every decode batch. So all shapes
at one place, a (batch size, context length), are measured in turns within seconds, and a machine that slows down slows
all of them alike.
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

# The result of one visit to a place: seconds by key "steps.part", and the mean context length by key CONTEXT.
Reading = dict[str, float]
CONTEXT = "context"


def read_log(log: DecodeLog, batch: int) -> Reading:
    """Read the times of the decode batches of `batch` sequences, and of the prompts before them.

    The time of a plain step or a cycle is the time between the starts of two batches, less the time caused by changes
    of the draft steps: switching, catching up and, without speculation, the drafter's own pass. Each reading is the
    lower quartile of its times: other work on the machine can only make them longer, some of them many times.
    """
    found: dict[str, list[float]] = defaultdict(list)
    decode = ~log.prefill
    whole = np.append(decode[1:], False) & decode & (log.batch == batch)  # the next entry is a decode batch as well
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
    done = {key: [each for each in taken if each > 0] for key, taken in found.items()}  # 0: did not happen
    reading = {key: float(np.quantile(taken, 0.25)) for key, taken in done.items() if taken}
    if contexts:
        reading[CONTEXT] = statistics.mean(contexts)
    return reading | _read_prompts(log, decode)


def _read_prompts(log: DecodeLog, decode: np.ndarray) -> Reading:
    """Times of reading all prompts, in all passes before the first decode batch."""
    first = int(decode.argmax()) if decode.any() else 0
    if not first:
        return {}
    return {"0.prefill": log.start[first] - log.start[0], "0.catch_up": float(log.extend[:first].sum())}


def cells_of(readings: Mapping[tuple[int, int], Sequence[Reading]]) -> list[Cell]:
    """Return the cells of all places (batch size, tokens of a prompt). Each visit is one repeat of a Timing.

    The context of a prompt's cell is the prompt's length. The context grows while a place is decoded, so a decoding
    cell has the mean over the visits of all batch sizes: they differ by a few tokens only, and cells of different batch
    sizes can be compared.
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
