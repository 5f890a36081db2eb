"""Feeder: responses that no engine has begun go to whichever engine has room for them first.

An engine that was dealt short responses takes over what others have not come to. Only what has not begun moves: nothing
drawn is lost, and nothing that was drawn decides what is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.rollout.fleet.deal import Unit

POLL_SECONDS = 0.05


class Queue:
    """The phase's units that wait. All ranks have the same; a counter in a store says how many have been taken."""

    def __init__(self, units: Sequence[Unit], store: dist.Store, name: str):
        """`name`: of the counter, another one for every phase."""
        self.units, self.store, self.name = list(units), store, name

    def take(self) -> Unit | None:
        """The next unit, which nobody else will get; None when there is none."""
        place = self._count(1) - 1
        return self.units[place] if place < len(self.units) else None

    def empty(self) -> bool:
        return self._count(0) >= len(self.units)

    def _count(self, more: int) -> int:
        try:
            return self.store.add(self.name, more)
        except RuntimeError as error:
            raise EngineError(f"the store that says which responses have begun does not answer: {error}") from error


class Feeder:
    """A thread that takes units of the queue for one engine while it has `room()`, and hands them over."""

    def __init__(self, queue: Queue, room: Callable[[], bool], hand: Callable[[Unit], None]):
        self.queue, self.room, self.hand = queue, room, hand
        self.error: EngineError | None = None  # why it ended before the queue was empty
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="feeder")
        self._thread.start()

    def feeding(self, seconds: float = 0.0) -> bool:
        """Whether it still may hand over something; asked after `seconds`, or earlier if it ends."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set() and not self.queue.empty():
                if not self.room():
                    self._stopped.wait(POLL_SECONDS)
                elif unit := self.queue.take():
                    self.hand(unit)
        except EngineError as error:
            self.error = error
