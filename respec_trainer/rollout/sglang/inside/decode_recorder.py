"""DecodeRecorder: records a DecodeLog inside the engine, at almost no cost. Plain Python, without sglang."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from respec_trainer.rollout.decode_log import DecodeLog

MOST_ROWS = 200_000  # about 100 MB; a phase has thousands


@dataclass(slots=True, eq=False)
class Row:
    """Row of a DecodeLog, with the names of its columns."""

    start: float
    prefill: bool
    batch: int
    context: float
    steps: int = 0
    tokens: int = 0
    survivors: list[int] = field(default_factory=list)
    draft: float = 0.0
    verify: float = 0.0
    extend: float = 0.0
    catch_up: float = 0.0
    caught_up: int = 0
    switch: float = 0.0
    decide: float = 0.0
    predicted: float = 0.0


class DecodeRecorder:
    """Rows of a DecodeLog, in the order of their batches.

    A batch's row is made when the batch starts. The counts of kept drafts arrive later, with overlapped scheduling only
    after the next batch has started. So decode rows wait for them in a queue, and `take` returns the rows before the
    first waiting one.

    Args:
        clock: returns seconds from an arbitrary zero.
        wait: called before the clock is read at both ends of a part, to wait for a device; None: do not wait.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[], None] | None = None,
        most_rows: int = MOST_ROWS,
    ):
        self.clock, self.wait, self.most_rows = clock, wait, most_rows
        self.rows: list[Row] = []
        self.dropped = 0
        self._unsettled: deque[Row] = deque()
        self._timing = False

    def begin(self, prefill: bool, batch: int, context: float, tokens: int = 0) -> Row:
        """Add the row of a batch that starts now. `tokens`: of a prefill batch, whose number is already known."""
        row = Row(self.clock(), prefill, batch, context, tokens=tokens)
        if len(self.rows) >= self.most_rows:
            old = self.most_rows // 2
            del self.rows[:old]
            self.dropped += old
        self.rows.append(row)
        if not prefill:
            self._unsettled.append(row)
        return row

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time spent inside to column `part` of the latest row. Of nested parts only the outermost counts."""
        if self._timing or not self.rows:
            yield
            return
        row, self._timing, started = self.rows[-1], True, self._clock()
        try:
            yield
        finally:
            self._timing = False
            setattr(row, part, getattr(row, part) + self._clock() - started)

    def settle(self, kept: Sequence[int], tokens: int) -> Row:
        """Complete and return the oldest waiting row.

        Args:
            kept: the number of kept drafts of each sequence.
            tokens: what the responses kept of all that was gained; less than what was verified where some end.

        Raises RuntimeError if no row waits or the batch sizes differ: rows and results would no longer correspond.
        """
        if not self._unsettled or self._unsettled[0].batch != len(kept):
            waiting = [row.batch for row in self._unsettled]
            raise RuntimeError(f"results of {len(kept)} sequences, but the batches without results have {waiting}")
        row = self._unsettled.popleft()
        row.tokens = tokens
        row.survivors = survivors_of(kept, row.steps)
        return row

    def take(self, failures: int = 0) -> DecodeLog:
        """Return the finished rows since the last call, as a DecodeLog."""
        waiting = self._unsettled[0] if self._unsettled else None
        ready = next((i for i, row in enumerate(self.rows) if row is waiting), len(self.rows))
        taken, self.rows = self.rows[:ready], self.rows[ready:]
        log = _as_log(taken)
        log.failures, log.dropped, self.dropped = failures, self.dropped, 0
        return log

    def _clock(self) -> float:
        if self.wait is not None:
            self.wait()
        return self.clock()


def survivors_of(kept: Sequence[int], steps: int) -> list[int]:
    """Return, for depths 1 to `steps`, how many sequences kept at least that many drafts."""
    counts = [0] * (steps + 1)
    for drafts in kept:
        counts[drafts] += 1
    alive, survivors = len(kept), []
    for dropped in counts[:steps]:
        alive -= dropped
        survivors.append(alive)
    return survivors


def _as_log(rows: list[Row]) -> DecodeLog:
    log = DecodeLog()
    for name in Row.__slots__:
        if name != "survivors":
            setattr(log, name, np.asarray([getattr(row, name) for row in rows], getattr(log, name).dtype))
    log.survivors = np.zeros((len(rows), max((row.steps for row in rows), default=0)), np.int64)
    for counts, row in zip(log.survivors, rows, strict=True):
        counts[: len(row.survivors)] = row.survivors
    return log
