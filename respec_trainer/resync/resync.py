"""Resync: after an update, put the actor's and the drafter's weights into every engine, and prove it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from respec_trainer.collectives import agree, broadcast
from respec_trainer.config import Config
from respec_trainer.dtypes import DTYPES
from respec_trainer.errors import ResyncError, TransferError
from respec_trainer.resync import proof
from respec_trainer.resync.finite import first_non_finite, local_weights
from respec_trainer.resync.proof import Held
from respec_trainer.resync.stream import ActorStream, NamedTensors, Shapes, WholeStream, numel_of
from respec_trainer.resync.transport import Transport
from respec_trainer.resync.workspace import Workspace
from respec_trainer.rollout.digest import digest
from respec_trainer.rollout.engine import Role, RolloutEngine


@dataclass(frozen=True)
class ResyncReport:
    """What the push of one model carried."""

    role: Role
    version: str
    tensors: int
    bytes: int
    seconds: float


class Resync:
    """Pushes weights to the engines. Every rank calls every method: ranks without an engine join the gathers.

    From the first tensor of a push until its proof the engines refuse to generate. A push that fails leaves them so:
    the next one carries both models whole, and is proved whatever `resync.verify` says.

    A push that an engine's death or a broken connection interrupts leaves engines with weights of unknown state, and
    perhaps stuck in a collective. Then all engines are ended, and every rank gets an EngineLostError.
    """

    def __init__(
        self,
        config: Config,
        actor,
        drafter,
        engine: RolloutEngine | None,
        transport: Transport,
        control: dist.ProcessGroup | None = None,
    ):
        """Connect to the engines. `control` carries small messages between all ranks; None: the default group.

        Raises ResyncError on every rank where an engine's model is not of the trainer's names and shapes.
        """
        self.settings, self.actor, self.drafter, self.engine = config.resync, actor, drafter, engine
        self.transport, self.control = transport, control
        self.dtype = DTYPES[config.model.dtype]
        self.workspace = Workspace(actor.topology.device)
        self.held: dict[Role, Held] = {}  # what the engines hold, as far as it was pushed
        self.doubtful = False  # whether the last push failed
        self.bytes = 0  # pushed since `take_bytes`
        transport.connect()
        self._together(self._check_architecture if engine else None)

    @property
    def versions(self) -> dict[Role, str]:
        """The versions that the trainer has."""
        versions: dict[Role, str] = {"target": self.actor.version}
        return versions if self.drafter is None else versions | {"draft": self.drafter.version}

    def connect(self) -> None:
        """Connect to the engines anew, after one was restarted. What they hold is not known then."""
        self._together(self.transport.disconnect)
        self._together(self.transport.connect)
        self.held = {}

    def push(self, forgot: bool = False, prove: bool = False) -> list[ResyncReport]:
        """Push the models whose version the engines do not hold; both, and whole, if an engine `forgot` them.

        With `prove`, as with `resync.verify`, digests of every tensor of both models are compared with those of what
        was sent. Raises on every rank: ProofError for a difference, ResyncError for weights that are not finite (then
        nothing was sent and the engines keep the last good version) or a rank that does not come in time.
        """
        self._assemble()
        proves = prove or self.doubtful or self.settings.verify != "off"
        whole = forgot or self.doubtful or (proves and not all(held.digests for held in self.held.values()))
        wanted = {role: version for role, version in self.versions.items() if whole or self._lacks(role, version)}
        self._refuse_non_finite(wanted)
        self._together(self._begin if self.engine else None)
        self.doubtful = True
        reports = [self._push(role, whole, proves) for role in wanted]
        if proves:
            self._prove(wanted)
        self._together(self.engine.trust if self.engine else None)
        self.doubtful = False
        self.workspace.release()
        return reports

    def take_bytes(self) -> int:
        """Bytes pushed to each engine since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def distrust(self, reason: str) -> None:
        """Let no engine generate until a push of both models has been proved."""
        self.doubtful = True
        if self.engine is not None:
            self.engine.distrust(reason)

    def _lacks(self, role: Role, version: str) -> bool:
        return role not in self.held or self.held[role].version != version

    def _assemble(self) -> None:
        """Wait for every rank, and name those that do not come."""
        limit, began = self.settings.timeout, time.monotonic()
        pushed = " and ".join(self.versions.values())
        try:
            dist.monitored_barrier(self.control, timedelta(seconds=limit), wait_all_ranks=True)
        except RuntimeError as error:
            if time.monotonic() - began < limit:  # the same words, at once: the connection to a rank is gone
                lost = dist.DistNetworkError(str(error))
                raise ResyncError(f"contact was lost before {pushed} could be pushed: {error}") from lost
            raise ResyncError(
                f"not every rank came to push {pushed} within {limit:.0f} s (resync.timeout); the engines hold "
                f"{self._holdings()}: {error}"
            ) from error

    def _refuse_non_finite(self, wanted: dict[Role, str]) -> None:
        def look() -> None:
            zero3 = self.actor.engine.zero_optimization_stage() == 3
            weights = {"target": lambda: local_weights(self.actor.engine.module, zero3)}
            weights["draft"] = lambda: self.drafter.named_tensors()
            for role, version in wanted.items():
                name = first_non_finite(weights[role]())
                if name is not None:
                    raise ResyncError(
                        f"{version} is not sent: {role} weight {name} holds NaN or infinity; the engines keep "
                        f"{self._holdings()}"
                    )

        self._together(look)

    def _begin(self) -> None:
        self.engine.distrust(f"{' and '.join(self.versions.values())} were being pushed and have not been verified")
        self.engine.abort_weight_update()

    def _push(self, role: Role, whole: bool, proves: bool) -> ResyncReport:
        began, version = time.perf_counter(), self.versions[role]
        stream = self._stream(role, frozen=whole or role not in self.held)
        shapes = stream.shapes
        before = self.held.pop(role, Held("none"))
        new = Held(version, dict(before.digests) if proves else {})
        self._together(lambda: self.engine and self.engine.begin_weight_update(role, list(shapes)))
        arrive: Callable[[], None] = _nothing
        with closing(iter(stream)) as buckets:
            for number, bucket in enumerate(buckets, 1):  # collected and copied while the one before is on its way
                flat = f"bucket-{number % 2}"
                tensors = bucket.copy(self.workspace, flat, views=self.transport.takes_views)
                self._together(arrive)
                doing = f"sending bucket {number} of {len(stream.buckets)} of {version}, {_span(bucket.shapes)}, to an "
                doing += f"engine that holds {before.version}"
                arrive = self._send(tensors, bucket.shapes, role, doing, new if proves else None)
                if not self.transport.takes_views:
                    self.workspace.forget(flat)
            self._together(arrive)
        self._together(lambda: self.engine and self.engine.end_weight_update(role, version))
        self.held[role] = new
        size = numel_of(shapes) * self.dtype.itemsize
        self.bytes += size
        return ResyncReport(role, version, len(shapes), size, time.perf_counter() - began)

    def _send(
        self, tensors: NamedTensors, shapes: Shapes, role: Role, doing: str, new: Held | None
    ) -> Callable[[], None]:
        """Set a bucket on its way; returns what waits for it, and digests it while engines load it."""
        sending = self.transport.start(tensors, shapes, role, doing)

        def arrive() -> None:
            sending.wait_sent()  # until then the copying of the transport needs the processor
            if new is not None and self.actor.topology.rank == self.transport.receivers[0]:
                new.digests |= {name: digest(tensor) for name, tensor in tensors}
            tensors.clear()
            sending.wait()

        return arrive

    def _stream(self, role: Role, frozen: bool) -> ActorStream | WholeStream:
        limit, receivers = self.settings.bucket_mb << 20, self.transport.receivers
        if role == "draft":
            wanted = self.actor.topology.rank in receivers
            return WholeStream(self.drafter.named_tensors(), wanted, limit, self.dtype)
        timeout = self.settings.timeout
        return ActorStream(self.actor, receivers, limit, self.dtype, self.workspace, timeout, frozen)

    def _prove(self, pushed: Sequence[Role]) -> None:
        for role in self.held:
            self.held[role] = broadcast(self.held[role], self.transport.receivers[0], self.control)
            check = functools.partial(self._check_digests, role, role in pushed)
            self._together(check if self.engine else None)

    def _check_digests(self, role: Role, pushed: bool) -> None:
        proof.check(role, self.held[role], self.engine.digests(role), pushed)

    def _check_architecture(self) -> None:
        for role, version in self.versions.items():
            theirs = self.engine.weight_shapes(role)
            if theirs:
                versions = f"the engine's {self.engine.versions[role]}, the trainer's {version}"
                proof.check_architecture(role, self._stream(role, frozen=True).shapes, theirs, versions)

    def _holdings(self) -> str:
        return " and ".join(held.version for held in self.held.values()) or "the weights of their folders"

    def _together(self, action: Callable[[], Any] | None) -> None:
        """Run `action` on every rank; they go on together, or raise together."""
        agree(action, self.engine, self.control, fatal=TransferError)


def _nothing() -> None:
    """Before the first bucket there is none to wait for."""


def _span(shapes: Sequence[str] | dict) -> str:
    names = list(shapes)
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
