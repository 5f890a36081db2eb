"""Rollouts: the engines as the loop sees them. They sample from the newest weights, whatever dies meanwhile.

Weights come from all ranks, so a dead engine is brought back by all ranks together: started anew, connected, given both
models whole, its weights proven; then it is asked again for what it owes.

Colocated engines and actor share the GPUs and take turns (without a GPU the same calls do nothing). Going to train, the
engine leaves first; going to generate, the actor leaves in two steps, because its weights are pushed between them:

    optimizer out -> engine's weights in -> push, proof -> actor's weights out -> engine's KV cache in -> canary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from respec_trainer.errors import EngineLostError, ProofError
from respec_trainer.resync import Resync
from respec_trainer.resync.canary import Canary, Continuation
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.fleet.fleet import RolloutFleet
from respec_trainer.rollout.fleet.pending import FleetPending
from respec_trainer.rollout.remote.link import HostAbsentError
from respec_trainer.rollout.sample import Request, Sample


class Generation:
    """Every rank calls every method, in the same order. `notify` tells the user of a restart."""

    def __init__(
        self,
        fleet: RolloutFleet,
        resync: Resync,
        actor,
        max_restarts: int,
        notify: Callable[[str], None],
        canary: Canary | None = None,
    ):
        """`canary`: sings after every push; None: no such check."""
        self.fleet, self.resync, self.actor, self.canary = fleet, resync, actor, canary
        self.max_restarts, self.notify = max_restarts, notify
        self.canary_error = 0.0  # of the last push, in nats
        self.fresh = False  # whether an engine has been started anew and holds the weights of its folders
        self.restarts = 0  # in this generation phase
        self.pending: FleetPending | None = None

    def push(self) -> None:
        """Put the weights of both models into the engines. The actor's optimizer and weights make room for them.

        Raises ProofError on every rank where an engine does not hold, or not speak, what was sent, twice in a row;
        ResyncError for weights that are not finite.
        """
        self._retry_after_restart(self._push)

    def start(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engines and return at once."""
        self.pending = self.fleet.start(requests)

    def generating(self) -> bool:
        """Whether this rank's engine still draws responses; False on a rank that owns none. Not collective."""
        return self.pending is not None and self.pending.generating()

    def collect(self) -> list[Sample]:
        """Every request's Sample, in order, on every rank; engines that die are brought back, and asked again.

        Raises EngineLostError on every rank after `max_restarts` restarts in one phase.
        """
        samples = self._retry_after_restart(self._collect)
        self.restarts = 0
        return samples

    def take_decode_log(self) -> list[DecodeLog]:
        """What the engines' batches did in the phase just collected; nothing where an engine has died since."""
        try:
            return self.fleet.take_decode_log()
        except EngineLostError:  # the next push brings it back
            return []

    def sleep(self) -> None:
        """Give the actor its room back. An engine that died is left for the next push: there is no room for it now."""
        with contextlib.suppress(EngineLostError):
            self.fleet.sleep()
        self.actor.onload()

    def metrics(self) -> dict[str, float]:
        """`engine/*` and `resync/*` since the last call.

        Engines started anew, tokens drawn again, tokens gone on from; bytes pushed, and the canary's last error.
        """
        counts = self.fleet.take_counts()
        metrics: dict[str, float] = {f"engine/{n}": counts[n] for n in ("restarts", "lost_tokens", "resumed_tokens")}
        metrics |= {"resync/bytes": self.resync.take_bytes()}
        return metrics | ({"resync/canary_error": self.canary_error} if self.canary else {})

    def _retry_after_restart(self, action: Callable[[], Any]) -> Any:
        """Do `action`, and do it again after each restart that it needs."""
        lost: EngineLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._restart(lost)
                return action()
            except HostAbsentError:  # it was waited for
                raise
            except EngineLostError as error:
                if self.restarts >= self.max_restarts:
                    raise EngineLostError(
                        f"{error}; {self.restarts} restarts in this generation phase were not enough "
                        "(rollout.engine.max_restarts)"
                    ) from error
                lost = error

    def _restart(self, lost: EngineLostError) -> None:
        self.restarts += 1
        self.notify(f"{lost}; restart {self.restarts} of {self.max_restarts} in this phase")
        self.fresh = True
        if self.fleet.shares_devices:
            self.actor.offload()  # as at the start: an engine sizes its cache by what it finds free
        self.fleet.restart()
        self.fleet.sleep()  # the actor must come back to be pushed
        self.resync.connect()

    def _collect(self) -> list[Sample]:
        if self.fresh:
            self._push()
        return self.pending.collect()

    def _push(self) -> None:
        """In the order that sharing a GPU needs."""
        self.fleet.check()
        self.actor.onload("weights")  # a push that is made again finds them out
        self._make_room("optimizer")
        voice = self.canary.actor_continuation(self.actor) if self.canary else None
        self.fleet.wake("weights")
        forgot = self.fleet.sleeps or self.fresh
        try:
            self.resync.push(forgot, prove=self.fresh)
        except ProofError as error:
            self.notify(f"{error}; both models are pushed again, whole")
            self.resync.push(forgot=True, prove=True)
        self._make_room("weights")
        self.fleet.wake("kv_cache")
        if voice is not None:
            self._check_canary(voice)
        self.fresh = False

    def _make_room(self, part: str) -> None:
        if self.fleet.shares_devices:
            self.actor.offload(part)

    def _check_canary(self, voice: Continuation) -> None:
        """Have every engine continue the canary's prompt, and compare."""
        try:
            errors = [self.canary.check(sample, voice) for sample in self.fleet.ask_each(self.canary.request())]
        except ProofError as error:
            self.resync.distrust(str(error))
            raise
        self.canary_error = max(errors)
