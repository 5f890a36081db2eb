"""Wall time of the phases of a step, named as in the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up seconds by phase name. Calls `on_phase` when a phase begins, and when it continues after an inner one."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None):
        self.seconds: dict[str, float] = {}
        self.on_phase = on_phase
        self._open: list[str] = []  # phases that have not ended, the outermost first
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.on_phase(name)
        self._open.append(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self._open.pop()
            if self._open:
                self.on_phase(self._open[-1])

    def take(self) -> dict[str, float]:
        """Return the times since the last call as `time/*` metrics in seconds, with `time/step` for all of it."""
        now = time.perf_counter()
        metrics = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        metrics["time/step"] = now - self._began
        self.seconds, self._began = {}, now
        return metrics
