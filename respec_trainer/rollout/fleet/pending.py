"""FleetPending: the requests of one generation phase, as one rank sees them, with or without an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending
from respec_trainer.rollout.fleet.deal import Unit
from respec_trainer.rollout.fleet.feeder import POLL_SECONDS, Feeder, Queue
from respec_trainer.rollout.fleet.ledger import Ledger
from respec_trainer.rollout.sample import Request, Sample

if TYPE_CHECKING:
    from respec_trainer.rollout.fleet.fleet import RolloutFleet


class FleetPending:
    """Requests that the engines are working on. They start when this is made."""

    def __init__(
        self, fleet: RolloutFleet, requests: Sequence[Request], mine: Sequence[Unit], queue: Queue | None = None
    ):
        """`requests`: all of the phase. `mine`: units that this rank's engine begins with. `queue`: waiting units."""
        self.fleet, self.requests, self.queue = fleet, list(requests), queue
        self.positions: list[int] = []  # of the ledger's requests in the phase
        self.ledger = Ledger([], fleet.resume)
        self.parts: list[Pending] = []  # submitted and not yet collected, in the order of the ledger
        self.submitted = 0  # requests in `parts`
        self.feeder: Feeder | None = None
        for unit in mine:
            self._own(unit)
        with contextlib.suppress(EngineError):  # `collect` tries again, and then all ranks raise
            self._submit()

    def collect(self) -> list[Sample]:
        """Return every sample of every engine, in the order of the requests, on every rank.

        If an engine died, raises EngineLostError on every rank once the others have finished. Their samples are kept:
        after `RolloutFleet.restart` and a push of the same weights, call `collect` again.
        """
        shares = self.fleet.agree(self.collect_own if self.fleet.engine else None)
        drawn = dict(pair for share in shares for pair in share)
        samples = [drawn[position] for position in range(len(self.requests))]
        self.fleet.dealer.observe(samples)
        return samples

    def collect_own(self) -> list[tuple[int, Sample]]:
        """Return the samples of this rank's engine with their requests' positions. Raises EngineError if it died."""
        self._submit()
        drawn: list[list[Sample]] = []
        try:
            # Collecting detects an engine that hangs; waiting for the feeder does not, so it comes second.
            while len(drawn) < len(self.parts) or self._fed(len(drawn)):
                if len(drawn) < len(self.parts):
                    drawn.append(self.parts[len(drawn)].collect())
            if self.feeder is not None and self.feeder.error is not None:
                raise self.feeder.error
            self.ledger.add([sample for part in drawn for sample in part])
        except EngineError:
            if self.feeder is not None:
                self.feeder.stop()
            if self.fleet.engine.failure is not None:
                self._salvage(drawn)
            raise
        finally:
            self.parts, self.feeder, self.submitted = [], None, 0
        return list(zip(self.positions, self.ledger.samples(), strict=True))

    def done(self) -> int:
        """Return how many of the requests submitted to this rank's engine have finished."""
        return sum(part.done() for part in list(self.parts))

    def generating(self) -> bool:
        """Return whether this rank's engine has unfinished requests or may get more.

        False if the engine's host is gone; `collect` then raises the error.
        """
        feeding = self.feeder is not None and self.feeder.feeding()
        try:
            return feeding or (bool(self.parts) and self.done() < self.submitted)
        except EngineError:
            return False

    def _own(self, unit: Unit) -> list[Request]:
        requests = [self.requests[position] for position in unit.positions]
        self.positions += unit.positions
        self.ledger.extend(requests)
        return requests

    def _submit(self) -> None:
        """Submit the ledger's open requests, and start the feeder if there is a queue."""
        if self.fleet.engine is None or self.parts or self.feeder is not None:
            return
        requests = self.ledger.remaining()
        if requests or self.queue is not None:
            self.fleet.restore_chooser()
        if requests:
            self.parts, self.submitted = [self.fleet.engine.submit(requests)], len(requests)
        if self.queue is not None:
            self.feeder = Feeder(self.queue, self._room, self._hand)

    def _room(self) -> bool:
        return self.submitted - self.done() < self.fleet.room

    def _hand(self, unit: Unit) -> None:
        requests = self._own(unit)  # before `submit`, so that the ledger keeps the requests if it fails
        self.parts.append(self.fleet.engine.submit(requests))
        self.submitted += len(requests)

    def _fed(self, taken: int) -> bool:
        """Return whether there are more than `taken` parts, or may be."""
        return self.feeder is not None and (self.feeder.feeding(POLL_SECONDS) or taken < len(self.parts))

    def _salvage(self, drawn: Sequence[Sequence[Sample]]) -> None:
        found = [sample for part in drawn for sample in part]
        found += [sample for part in self.parts[len(drawn) :] for sample in part.delivered()]
        owed = self.ledger.remaining()[len(found) :]  # taken from the queue after the engine died
        found += [Sample(request.key, list(request.prompt_ids), [], [], "lost", "", "") for request in owed]
        before = self.ledger.lost_tokens, self.ledger.resumed_tokens
        self.ledger.add(found)
        self.fleet.counts["lost_tokens"] += self.ledger.lost_tokens - before[0]
        self.fleet.counts["resumed_tokens"] += self.ledger.resumed_tokens - before[1]
