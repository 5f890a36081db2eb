"""Rollouts: the engines as the loop sees them. They sample from the newest weights, whatever dies meanwhile.

Weights come from all ranks, so a dead engine is brought back by all ranks together: started anew, connected, given both
models whole, its weights proven; then it is asked again for what it owes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from respec_trainer.errors import EngineLostError
from respec_trainer.resync import Resync
from respec_trainer.rollout.fleet import FleetPending, RolloutFleet
from respec_trainer.rollout.sample import Request, Sample


class Rollouts:
    """Every rank calls every method, in the same order. `say` tells the user of a restart."""

    def __init__(self, fleet: RolloutFleet, resync: Resync, max_restarts: int, say: Callable[[str], None]):
        self.fleet, self.resync, self.max_restarts, self.say = fleet, resync, max_restarts, say
        self.step = 0  # of the weights that the engines must hold
        self.fresh = False  # whether an engine has been started anew and holds the weights of its folders
        self.restarts = 0  # in this generation phase
        self.pending: FleetPending | None = None

    def push(self, step: int) -> None:
        """Put the weights of both models into the engines: the actor as version `step`. A generation phase begins."""
        self.step = step
        self._outlive(self._push)

    def start(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engines and return at once."""
        self.pending = self.fleet.start(requests)

    def collect(self) -> list[Sample]:
        """Every request's Sample, in order, on every rank; engines that die are brought back, and asked again.

        Raises EngineLostError on every rank after `max_restarts` restarts in one phase.
        """
        samples = self._outlive(self._collect)
        self.restarts = 0
        return samples

    def sleep(self) -> None:
        """Make room for the actor. An engine that died is left for the next push: there is no room for it now."""
        with contextlib.suppress(EngineLostError):
            self.fleet.sleep()

    def metrics(self) -> dict[str, int]:
        """`engine/*` since the last call: engines started anew, tokens drawn again, and tokens gone on from."""
        counts = self.fleet.take_counts()
        return {f"engine/{name}": counts[name] for name in ("restarts", "lost_tokens", "resumed_tokens")}

    def _outlive(self, action: Callable[[], Any]) -> Any:
        """Do `action`, and do it again after each restart that it needs."""
        lost: EngineLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._restart(lost)
                return action()
            except EngineLostError as error:
                if self.restarts >= self.max_restarts:
                    raise EngineLostError(
                        f"{error}; {self.restarts} restarts in this generation phase were not enough "
                        "(rollout.engine.max_restarts)"
                    ) from error
                lost = error

    def _restart(self, lost: EngineLostError) -> None:
        self.restarts += 1
        self.say(f"{lost}; restart {self.restarts} of {self.max_restarts} in this phase")
        self.fresh = True
        self.fleet.restart()
        self.resync.connect()

    def _collect(self) -> list[Sample]:
        if self.fresh:
            self._push()
        return self.pending.collect()

    def _push(self) -> None:
        """In the order that a sleeping engine needs; an engine that is awake stays so."""
        self.fleet.check()
        self.fleet.wake("weights")
        self.resync.push(self.step, forgot=self.fleet.sleeps or self.fresh, prove=self.fresh)
        self.fleet.wake("kv_cache")
        self.fresh = False
