"""Generation of rollouts by the engines, from the newest weights, with restarts of engines that die.

The weights are spread over all ranks, so all ranks restart a dead engine together: they start it again, connect, push
both models completely and verify the weights. Then the engine draws its missing responses.

Colocated engines and actor share the GPUs and use them in turn (without a GPU these calls do nothing). Before training
the engine frees its memory first. Before generation the actor frees its memory in two steps, with the push of its
weights between them:

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
    """Pushes weights to the engines and collects their samples. Every rank calls every method, in the same order."""

    def __init__(
        self,
        fleet: RolloutFleet,
        resync: Resync,
        actor,
        max_restarts: int,
        notify: Callable[[str], None],
        canary: Canary | None = None,
    ):
        """
        Args:
            max_restarts: restarts of engines in one generation phase before the run ends.
            notify: informs the user of a restart.
            canary: the check that follows every push; None: no such check.
        """
        self.fleet, self.resync, self.actor, self.canary = fleet, resync, actor, canary
        self.max_restarts, self.notify = max_restarts, notify
        self.canary_error = 0.0  # after the last push, in nats
        self.fresh = False  # whether an engine was restarted and holds the weights of its folders
        self.restarts = 0  # in this generation phase
        self.pending: FleetPending | None = None

    def push(self) -> None:
        """Put the weights of both models into the engines. The actor frees its optimizer and weights first.

        Raises ProofError on every rank if an engine twice in a row does not hold what was sent, or fails the canary;
        ResyncError for weights that are not finite.
        """
        self._retry_after_restart(self._push)

    def start(self, requests: Sequence[Request]) -> None:
        """Send the requests to the engines and return at once."""
        self.pending = self.fleet.start(requests)

    def generating(self) -> bool:
        """Return whether this rank's engine still draws responses; False on a rank without one. Not collective."""
        return self.pending is not None and self.pending.generating()

    def collect(self) -> list[Sample]:
        """Return the Sample of every request, in order, on every rank. Engines that die are restarted and draw again.

        Raises EngineLostError on every rank after `max_restarts` restarts in one phase.
        """
        samples = self._retry_after_restart(self._collect)
        self.restarts = 0
        return samples

    def take_decode_log(self) -> list[DecodeLog]:
        """Return the logs of the engines' batches in the phase just collected; [] if an engine has died since."""
        try:
            return self.fleet.take_decode_log()
        except EngineLostError:  # the next push restarts it
            return []

    def sleep(self) -> None:
        """Return the memory to the actor. The next push restarts a dead engine: now there is no memory for it."""
        with contextlib.suppress(EngineLostError):
            self.fleet.sleep()
        self.actor.onload()

    def metrics(self) -> dict[str, float]:
        """Return the metrics `engine/*` and `resync/*` since the last call.

        These are restarts, tokens drawn again, tokens from which engines resumed, bytes pushed, and the last canary
        error.
        """
        counts = self.fleet.take_counts()
        metrics: dict[str, float] = {f"engine/{n}": counts[n] for n in ("restarts", "lost_tokens", "resumed_tokens")}
        metrics |= {"resync/bytes": self.resync.take_bytes()}
        return metrics | ({"resync/canary_error": self.canary_error} if self.canary else {})

    def _retry_after_restart(self, action: Callable[[], Any]) -> Any:
        """Run `action`; after a lost engine restart it and run `action` again, up to `max_restarts` times."""
        lost: EngineLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._restart(lost)
                return action()
            except HostAbsentError:  # the fleet has waited for it already
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
            self.actor.offload()  # as at the start: an engine sizes its cache by the free memory
        self.fleet.restart()
        self.fleet.sleep()  # the push needs the actor on the device
        self.resync.connect()

    def _collect(self) -> list[Sample]:
        if self.fresh:
            self._push()
        return self.pending.collect()

    def _push(self) -> None:
        """Push once, in the order that a shared GPU needs (see the module)."""
        self.fleet.check()
        self.actor.onload("weights")  # if an earlier try failed, they are still offloaded
        self._make_room("optimizer")
        expected = self.canary.actor_continuation(self.actor) if self.canary else None
        self.fleet.wake("weights")
        weights_lost = self.fleet.sleeps or self.fresh
        try:
            self.resync.push(weights_lost, prove=self.fresh)
        except ProofError as error:
            self.notify(f"{error}; both models are pushed again, whole")
            self.resync.push(whole=True, prove=True)
        self._make_room("weights")
        self.fleet.wake("kv_cache")
        if expected is not None:
            self._check_canary(expected)
        self.fresh = False

    def _make_room(self, part: str) -> None:
        if self.fleet.shares_devices:
            self.actor.offload(part)

    def _check_canary(self, expected: Continuation) -> None:
        """Compare every engine's continuation of the canary's prompt with the expected one."""
        try:
            errors = [self.canary.check(sample, expected) for sample in self.fleet.ask_each(self.canary.request())]
        except ProofError as error:
            self.resync.distrust(str(error))
            raise
        self.canary_error = max(errors)
