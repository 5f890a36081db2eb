"""Resync: after an update, put the actor's and the drafter's weights into every engine, and say which they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from respec_trainer.agreement import agree
from respec_trainer.config import Config
from respec_trainer.errors import ResyncError, TransferError
from respec_trainer.resync import proof
from respec_trainer.resync.stream import NamedTensors, stream_actor
from respec_trainer.resync.transport import Transport
from respec_trainer.rollout.engine import Role, RolloutEngine
from respec_trainer.rollout.sglang_digest import digest


@dataclass(frozen=True)
class ResyncReport:
    """What one push carried, as rank 0 counted it."""

    role: Role
    version: str
    tensors: int
    bytes: int
    seconds: float


class Resync:
    """Pushes weights to the engines. Every rank calls every method: ranks without an engine join the gathers.

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
        """`control` carries small messages between all ranks; None: the default group."""
        self.bucket_bytes = config.resync.bucket_mb << 20
        self.dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
        self.actor, self.drafter, self.engine, self.transport = actor, drafter, engine, transport
        self.control = control
        self.provable = config.rollout.engine.tp == 1  # a shard of a weight has a digest of its own
        self.pushed_drafter: str | None = None
        transport.connect()

    def connect(self) -> None:
        """Connect to the engines anew, after one was restarted."""
        self._together(self.transport.disconnect)
        self._together(self.transport.connect)

    def push(self, step: int, forgot: bool = False, prove: bool = False) -> list[ResyncReport]:
        """Push the actor as version `step`, and the drafter if it changed or the engine `forgot` it.

        With `prove` every engine's digests of both models are compared with those of what was sent; a difference
        raises ResyncError on every rank.
        """
        reports = [self._push("target", f"actor-{step}", self._actor_buckets(), prove)]
        if self.drafter is not None and (forgot or self.drafter.version != self.pushed_drafter):
            reports.append(self._push("draft", self.drafter.version, self._drafter_buckets(), prove))
            self.pushed_drafter = self.drafter.version
        return reports

    def _push(self, role: Role, version: str, stream: Iterator[NamedTensors], prove: bool) -> ResyncReport:
        began = time.perf_counter()
        digests: dict[str, str] = {}
        size = 0
        self._together(lambda: self.engine and self.engine.begin_weight_update(role))
        with closing(stream) as buckets:
            for bucket in buckets:
                for name, tensor in bucket:
                    if name in digests:
                        raise ResyncError(f"{role} weight {name} was streamed twice")
                    digests[name] = digest(tensor) if prove and self.provable else ""
                    size += tensor.numel() * tensor.element_size()
                self._together(lambda: self.transport.send(bucket, role))  # noqa: B023 - called at once
        self._together(lambda: self.engine and self.engine.end_weight_update(role, version))
        if prove and self.provable:
            self._prove(role, digests)
        return ResyncReport(role, version, len(digests), size, time.perf_counter() - began)

    def _prove(self, role: Role, digests: dict[str, str]) -> None:
        sent = [digests]
        dist.broadcast_object_list(sent, src=self.transport.receivers[0], group=self.control)
        self._together(lambda: self.engine and proof.check(role, sent[0], self.engine.digests(role)))

    def _together(self, action: Callable[[], Any]) -> None:
        """Run `action` on every rank; they go on together, or raise together."""
        agree(action, self.engine, self.control, fatal=TransferError)

    def _actor_buckets(self) -> Iterator[NamedTensors]:
        for bucket in stream_actor(self.actor, self.transport.receivers, self.bucket_bytes):
            yield [(name, tensor.to(self.dtype).contiguous()) for name, tensor in bucket]

    def _drafter_buckets(self) -> Iterator[NamedTensors]:
        wanted = self.actor.topology.rank in self.transport.receivers
        device = self.actor.topology.device
        bucket: NamedTensors = []
        for name, tensor in self.drafter.named_tensors():
            size = sum(t.numel() * t.element_size() for _, t in bucket)
            if bucket and size + tensor.numel() * tensor.element_size() > self.bucket_bytes:
                yield bucket if wanted else []
                bucket = []
            bucket.append((name, tensor.detach().to(device, self.dtype).contiguous()))
        yield bucket if wanted else []
