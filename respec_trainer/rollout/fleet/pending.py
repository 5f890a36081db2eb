"""FleetPending: the requests of one generation phase, as the rank of one engine, or of none, sees them."""

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
    """Requests the engines are working on. They run from the moment this is made."""

    def __init__(
        self, fleet: RolloutFleet, requests: Sequence[Request], mine: Sequence[Unit], queue: Queue | None = None
    ):
        """`requests`: all of the phase. `mine`: what this rank's engine begins with. `queue`: what waits for any."""
        self.fleet, self.requests, self.queue = fleet, list(requests), queue
        self.positions: list[int] = []  # of what the ledger holds
        self.ledger = Ledger([], fleet.resume)
        self.parts: list[Pending] = []  # what was submitted and not yet taken in, in the order of the ledger
        self.asked = 0  # requests of them
        self.feeder: Feeder | None = None
        for unit in mine:
            self._own(unit)
        with contextlib.suppress(EngineError):  # only this rank knows of it: `collect` tries again, and all hear of it
            self._submit()

    def collect(self) -> list[Sample]:
        """Every sample of every engine, in the order the requests were given, on every rank.

        Raises EngineLostError on every rank if an engine died, once the others have finished. What they drew is kept:
        after `RolloutFleet.restart` and a push of the same weights, collect again.
        """
        shares = self.fleet.agree(self.collect_own if self.fleet.engine else None)
        drawn = dict(pair for share in shares for pair in share)
        samples = [drawn[position] for position in range(len(self.requests))]
        self.fleet.dealer.observe(samples)
        return samples

    def done(self) -> int:
        """How many of this rank's own engine's requests have finished, of those it has been given."""
        return sum(part.done() for part in list(self.parts))

    def generating(self) -> bool:
        """Whether this rank's own engine has requests that have not finished, or may get more.

        False if the engine is gone with its host: `collect` says so.
        """
        feeding = self.feeder is not None and self.feeder.feeding()
        try:
            return feeding or (bool(self.parts) and self.done() < self.asked)
        except EngineError:
            return False

    def _own(self, unit: Unit) -> list[Request]:
        requests = [self.requests[position] for position in unit.positions]
        self.positions += unit.positions
        self.ledger.extend(requests)
        return requests

    def _submit(self) -> None:
        """Hand the engine all that it owes, and whoever feeds it."""
        if self.fleet.engine is None or self.parts or self.feeder is not None:
            return
        requests = self.ledger.remaining()
        if requests or self.queue is not None:
            self.fleet.restore_chooser()
        if requests:
            self.parts, self.asked = [self.fleet.engine.submit(requests)], len(requests)
        if self.queue is not None:
            self.feeder = Feeder(self.queue, self._room, self._hand)

    def _room(self) -> bool:
        return self.asked - self.done() < self.fleet.room

    def _hand(self, unit: Unit) -> None:
        requests = self._own(unit)  # first: what was taken and could not be submitted is owed
        self.parts.append(self.fleet.engine.submit(requests))
        self.asked += len(requests)

    def collect_own(self) -> list[tuple[int, Sample]]:
        """(position, sample) of what this rank's own engine drew. Raises EngineError if it died."""
        self._submit()
        drawn: list[list[Sample]] = []
        try:
            # Whoever waits for an engine's responses notices if it hangs, so waiting for the feeder comes second.
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
            self.parts, self.feeder, self.asked = [], None, 0
        return list(zip(self.positions, self.ledger.samples(), strict=True))

    def _fed(self, taken: int) -> bool:
        """Whether more than `taken` parts are there, or may come."""
        return self.feeder is not None and (self.feeder.feeding(POLL_SECONDS) or taken < len(self.parts))

    def _salvage(self, drawn: Sequence[Sequence[Sample]]) -> None:
        found = [sample for part in drawn for sample in part]
        found += [sample for part in self.parts[len(drawn) :] for sample in part.delivered()]
        owed = self.ledger.remaining()[len(found) :]  # taken from the queue when there was no engine any more
        found += [Sample(request.key, list(request.prompt_ids), [], [], "lost", "", "") for request in owed]
        before = self.ledger.lost_tokens, self.ledger.resumed_tokens
        self.ledger.add(found)
        self.fleet.counts["lost_tokens"] += self.ledger.lost_tokens - before[0]
        self.fleet.counts["resumed_tokens"] += self.ledger.resumed_tokens - before[1]
