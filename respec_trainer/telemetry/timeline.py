"""Timeline: one engine's batches in a generation phase, and the time that plain decoding would have taken.

All shares and means are weighted by time. For each batch let t be the seconds it took, k the tokens a sequence that
responses kept of it, and c the seconds of one decode step without speculation. The achieved speed-up is sum(k c) /
sum(t). The mean of the predicted speed-ups p is sum(p t) / sum(t), which equals the achieved speed-up if every
prediction p = k c / t is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from respec_trainer.errors import DataError
from respec_trainer.rollout.decode_log import DecodeLog

# (sequences [N], their mean contexts [N]) -> seconds of one decode step without speculation [N]
PlainSeconds = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Timeline:
    """The log of N batches; `plain` [N]: seconds of a decode step without speculation on each, NaN if unknown."""

    log: DecodeLog
    plain: np.ndarray

    @classmethod
    def of(cls, log: DecodeLog, plain_seconds: PlainSeconds | None) -> Timeline:
        if plain_seconds is None or not len(log):
            return cls(log, np.full(len(log), np.nan))
        return cls(log, plain_seconds(log.batch.astype(float), log.context))

    @cached_property
    def decodes(self) -> np.ndarray:
        """[N] bool: True for batches that decode, False for those that read prompts."""
        return ~self.log.prefill

    @cached_property
    def seconds(self) -> np.ndarray:
        """[N] seconds from each batch's start to the next one's start; for the last batch the sum of its parts."""
        log = self.log
        parts = log.draft + log.verify + log.extend + log.catch_up + log.switch + log.decide
        return np.where(np.isnan(log.period), parts, log.period)

    @cached_property
    def earned(self) -> np.ndarray:
        """[N] seconds that plain decoding needs for as many tokens."""
        return self.plain * self.log.tokens / self.log.batch

    @cached_property
    def times(self) -> np.ndarray:
        """[N + 1] seconds from the start of the phase to the start of each batch, and to the end of the last."""
        began = self.log.start - self.log.start[0]
        return np.append(began, began[-1] + self.seconds[-1])


def pool(timelines: Sequence[Timeline], column: Callable[[Timeline], np.ndarray]) -> np.ndarray:
    """A column of all decode batches, of one engine after the other."""
    return np.concatenate([np.zeros(0), *(column(line)[line.decodes] for line in timelines)])


def steps_used(timelines: Sequence[Timeline]) -> set[int]:
    """All numbers of draft steps that decode batches used."""
    return {int(steps) for steps in pool(timelines, lambda line: line.log.steps)}


def switches(timelines: Sequence[Timeline]) -> int:
    """The number of decode batches with other draft steps than the batch before them."""
    return sum(int(np.count_nonzero(np.diff(line.log.steps[line.decodes]))) for line in timelines)


def acceptance_by_depth(timelines: Sequence[Timeline]) -> list[float]:
    """The share of drafts accepted at each depth, given that those before were, over the batches that drafted so deep.

    The list ends before the first depth that was never tried.
    """
    found: list[float] = []
    while True:
        depth, tried, kept = len(found), 0, 0
        for log in (line.log for line in timelines):
            if depth >= log.survivors.shape[1]:
                continue
            deep = ~log.prefill & (log.steps > depth)
            before = log.survivors[:, depth - 1] if depth else log.batch
            tried, kept = tried + int(before[deep].sum()), kept + int(log.survivors[deep, depth].sum())
        if not tried:
            return found
        found.append(kept / tried)


def mean_by_time(values: np.ndarray, seconds: np.ndarray) -> float | None:
    """The mean of `values` weighted by `seconds`; None if no time passed."""
    total = float(seconds.sum())
    return float((values * seconds).sum()) / total if total > 0 else None


def save_timelines(timelines: Sequence[Timeline], path: Path) -> None:
    """Write one .npz: every column of engine i as "i.NAME", and "i.plain"."""
    arrays = {}
    for index, line in enumerate(timelines):
        columns = line.log.to_arrays() | {"plain": line.plain}
        arrays |= {f"{index}.{name}": values for name, values in columns.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_timelines(path: Path) -> list[Timeline]:
    """Read a file of `save_timelines`. Raises DataError for any other file."""
    columns: dict[int, dict[str, np.ndarray]] = {}
    try:
        with np.load(path) as file:
            for name in file.files:
                index, _, column = name.partition(".")
                columns.setdefault(int(index), {})[column] = file[name]
        return [Timeline(DecodeLog.of_arrays(found), found["plain"]) for _, found in sorted(columns.items())]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} is not a file of decode batches, as runs write them: {error!r}") from error


def edges_of(line: Timeline, count: int) -> np.ndarray:
    """The edges [count + 1] of `count` equal intervals of the phase's time, in seconds since it began."""
    return np.linspace(0.0, line.times[-1], count + 1)


def ratio_by_time(line: Timeline, chosen: np.ndarray, above: np.ndarray, below: np.ndarray, count: int) -> np.ndarray:
    """sum(above) / sum(below) over the `chosen` batches, [count]: one for each of `count` equal intervals of time.

    A batch is split over intervals by the share of its time in each. NaN for an interval without a chosen batch.
    """
    edges = edges_of(line, count)
    top, bottom = (
        np.diff(np.interp(edges, line.times, np.append(0.0, np.cumsum(np.where(chosen, part, 0.0)))))
        for part in (above, below)
    )
    return np.divide(top, bottom, out=np.full(count, np.nan), where=bottom > 1e-9 * bottom.sum())


def spans(flags: np.ndarray, edges: np.ndarray) -> list[tuple[float, float]]:
    """The (start, end) of each unbroken run of True in `flags`, where flags[i] covers edges[i] to edges[i + 1]."""
    turns = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(float(edges[a]), float(edges[b])) for a, b in list(pairwise(turns))[::2]]
