"""Feeder: gives the waiting units of a phase to the engines that have room first.

An engine that was dealt short responses takes over units that no engine has begun. Only such units move, so no drawn
token is lost, and no drawn token affects what is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.rollout.fleet.deal import Unit

POLL_SECONDS = 0.05


class Queue:
    """The waiting units of a phase, the same list on all ranks. A counter in a store holds how many were taken."""

    def __init__(self, units: Sequence[Unit], store: dist.Store, name: str):
        """`name`: of the counter; every phase has another."""
        self.units, self.store, self.name = list(units), store, name

    def take(self) -> Unit | None:
        """Return the next unit, which no other rank will get; None if there is none."""
        index = self._count(1) - 1
        return self.units[index] if index < len(self.units) else None

    def empty(self) -> bool:
        return self._count(0) >= len(self.units)

    def _count(self, more: int) -> int:
        try:
            return self.store.add(self.name, more)
        except RuntimeError as error:
            raise EngineError(
                f"the store that counts the responses that have begun does not answer: {error}"
            ) from error


class Feeder:
    """A thread that takes units from the queue for one engine while `room()` is true, and passes them to `hand`."""

    def __init__(self, queue: Queue, room: Callable[[], bool], hand: Callable[[Unit], None]):
        self.queue, self.room, self.hand = queue, room, hand
        self.error: EngineError | None = None  # the error that ended the thread before the queue was empty
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="feeder")
        self._thread.start()

    def feeding(self, seconds: float = 0.0) -> bool:
        """Wait `seconds`, less if the thread ends; return whether it may still pass units on."""
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
