"""Resync: after an update, put the actor's and the drafter's weights into every engine, and say which they are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from respec_trainer.config import Config
from respec_trainer.errors import ResyncError
from respec_trainer.resync.stream import NamedTensors, stream_actor
from respec_trainer.resync.transport import Transport
from respec_trainer.rollout.engine import Role, RolloutEngine


@dataclass(frozen=True)
class ResyncReport:
    """What one push carried, as rank 0 counted it."""

    role: Role
    version: str
    tensors: int
    bytes: int
    seconds: float


class Resync:
    """Pushes weights to the engines. Every rank calls every method: ranks without an engine join the gathers."""

    def __init__(self, config: Config, actor, drafter, engine: RolloutEngine | None, transport: Transport):
        self.bucket_bytes = config.resync.bucket_mb << 20
        self.dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
        self.actor, self.drafter, self.engine, self.transport = actor, drafter, engine, transport
        self.pushed_drafter: str | None = None
        transport.connect()

    def push(self, step: int, forgot: bool = False) -> list[ResyncReport]:
        """Push the actor as version `step`, and the drafter if it changed or the engine `forgot` it over a sleep."""
        reports = [self._push("target", f"actor-{step}", self._actor_buckets())]
        if self.drafter is not None and (forgot or self.drafter.version != self.pushed_drafter):
            reports.append(self._push("draft", self.drafter.version, self._drafter_buckets()))
            self.pushed_drafter = self.drafter.version
        return reports

    def _push(self, role: Role, version: str, buckets: Iterable[NamedTensors]) -> ResyncReport:
        began = time.perf_counter()
        names: set[str] = set()
        size = 0
        if self.engine is not None:
            self.engine.begin_weight_update(role)
        for bucket in buckets:
            for name, tensor in bucket:
                if name in names:
                    raise ResyncError(f"{role} weight {name} was streamed twice")
                names.add(name)
                size += tensor.numel() * tensor.element_size()
            self.transport.send(bucket, role)
        if self.engine is not None:
            self.engine.end_weight_update(role, version)
        return ResyncReport(role, version, len(names), size, time.perf_counter() - began)

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
