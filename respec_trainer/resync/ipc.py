"""Weights by memory handles: engine and owner share a device, so a bucket stays where it is."""

from __future__ import annotations

from respec_trainer.resync.stream import NamedTensors, Shapes
from respec_trainer.resync.transport import Sending, Transport, attempt
from respec_trainer.rollout.engine import Role, RolloutEngine


class IPCTransport(Transport):
    """Each owner hands its engine handles to the tensors of a bucket. Without a GPU the memory is the host's."""

    takes_views = False  # the engine's last reader may close a handle after it has answered

    def __init__(self, engine: RolloutEngine | None, engine_ranks: list[int], timeout: float):
        self.engine, self.receivers, self.timeout = engine, list(engine_ranks), timeout

    def disconnect(self) -> None:
        """Nothing to disconnect."""

    def connect(self) -> None:
        """Nothing to connect: handles travel with each bucket."""

    def start(self, bucket: NamedTensors, specs: Shapes, role: Role, doing: str) -> Sending:
        engine = self.engine
        return attempt(lambda: [engine.receive_tensors(bucket, role)] if engine and bucket else [], doing, self.timeout)
