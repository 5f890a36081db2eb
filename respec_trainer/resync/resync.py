"""Resync: after an update, send the actor's and the drafter's weights to every engine, and verify them."""

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
    """The facts about the push of one model."""

    role: Role
    version: str
    tensors: int
    bytes: int
    seconds: float


class Resync:
    """Pushes weights to the engines. Every rank calls every method, because all ranks take part in the gathers.

    The engines refuse to generate from the first tensor of a push until it is verified. After a failed push they still
    refuse; the next push sends both models completely and verifies them, for every value of `resync.verify`.

    If an engine dies or a connection breaks during a push, the weights of the engines are unknown, and engines may be
    stuck in a collective. Then all engines are ended, and every rank gets an EngineLostError.
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
        """Connect to the engines. `control` is the group for small messages between all ranks; None: the default group.

        Raises ResyncError on every rank if an engine's model has other names or shapes than the trainer's.
        """
        self.settings, self.actor, self.drafter, self.engine = config.resync, actor, drafter, engine
        self.transport, self.control = transport, control
        self.dtype = DTYPES[config.model.dtype]
        self.workspace = Workspace(actor.topology.device)
        self.held: dict[Role, Held] = {}  # the weights that were pushed to the engines
        self.doubtful = False  # whether the last push failed
        self.bytes = 0  # pushed since `take_bytes`
        transport.connect()
        self._together(self._check_architecture if engine else None)

    @property
    def versions(self) -> dict[Role, str]:
        """The current versions of the trainer's models."""
        versions: dict[Role, str] = {"target": self.actor.version}
        return versions if self.drafter is None else versions | {"draft": self.drafter.version}

    def connect(self) -> None:
        """Connect to the engines again, after a restart. The weights of the engines are unknown then."""
        self._together(self.transport.disconnect)
        self._together(self.transport.connect)
        self.held = {}

    def push(self, whole: bool = False, prove: bool = False) -> list[ResyncReport]:
        """Push the models whose current version the engines do not hold.

        Args:
            whole: push both models, with all tensors, because an engine lost its weights.
            prove: compare the digests of every tensor of both models with those of what was sent, even if
                `resync.verify` is off.

        Raises on every rank: ProofError for a difference, ResyncError for weights that are not finite (then nothing was
        sent and the engines keep the last good version) or for a rank that does not take part in time.
        """
        self._assemble()
        proves = prove or self.doubtful or self.settings.verify != "off"
        whole = whole or self.doubtful or (proves and not all(held.digests for held in self.held.values()))
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
        """Return the bytes pushed to each engine since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def distrust(self, reason: str) -> None:
        """Forbid generation on all engines until a push of both models has been verified."""
        self.doubtful = True
        if self.engine is not None:
            self.engine.distrust(reason)

    def _lacks(self, role: Role, version: str) -> bool:
        return role not in self.held or self.held[role].version != version

    def _assemble(self) -> None:
        """Wait for every rank. Raises ResyncError that names the ranks that do not come."""
        limit, began = self.settings.timeout, time.monotonic()
        pushed = " and ".join(self.versions.values())
        try:
            dist.monitored_barrier(self.control, timedelta(seconds=limit), wait_all_ranks=True)
        except RuntimeError as error:
            if time.monotonic() - began < limit:  # the same error, but at once: the connection to a rank is gone
                lost = dist.DistNetworkError(str(error))
                raise ResyncError(f"contact was lost before {pushed} could be pushed: {error}") from lost
            raise ResyncError(
                f"not every rank came to push {pushed} within {limit:.0f} s (resync.timeout); the engines hold "
                f"{self._holdings()}: {error}"
            ) from error

    def _refuse_non_finite(self, wanted: dict[Role, str]) -> None:
        def check() -> None:
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

        self._together(check)

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
            for number, bucket in enumerate(buckets, 1):  # gathered and copied while the previous bucket is sent
                flat = f"bucket-{number % 2}"
                tensors = bucket.copy(self.workspace, flat, views=self.transport.takes_views)
                self._together(arrive)
                doing = f"sending bucket {number} of {len(stream.buckets)} of {version}, {_span(bucket.shapes)}, to an "
                doing += f"engine that holds {before.version}"
                arrive = self._send(tensors, bucket.shapes, role, doing, new if proves else None)
                if not self.transport.takes_views:
                    self.workspace.drop(flat)
            self._together(arrive)
        self._together(lambda: self.engine and self.engine.end_weight_update(role, version))
        self.held[role] = new
        size = numel_of(shapes) * self.dtype.itemsize
        self.bytes += size
        return ResyncReport(role, version, len(shapes), size, time.perf_counter() - began)

    def _send(
        self, tensors: NamedTensors, shapes: Shapes, role: Role, doing: str, new: Held | None
    ) -> Callable[[], None]:
        """Start to send a bucket. Return a function that waits for it, and computes digests while engines load it."""
        sending = self.transport.start(tensors, shapes, role, doing)

        def arrive() -> None:
            sending.wait_sent()  # until then the transport needs the processor for its copies
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
        """Run `action` on every rank; all ranks continue, or all raise."""
        agree(action, self.engine, self.control, fatal=TransferError)


def _nothing() -> None:
    """Do nothing: before the first bucket there is none to wait for."""


def _span(shapes: Sequence[str] | dict) -> str:
    names = list(shapes)
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
