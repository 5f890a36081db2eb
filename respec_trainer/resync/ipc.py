"""Weight transfer by memory handles: engine and owner share a device, so a bucket is not copied."""

from __future__ import annotations

from respec_trainer.resync.stream import NamedTensors, Shapes
from respec_trainer.resync.transport import Sending, Transport, attempt
from respec_trainer.rollout.engine import Role, RolloutEngine


class IPCTransport(Transport):
    """Each owner sends its engine handles to the tensors of a bucket. Without a GPU the tensors are in host memory."""

    takes_views = False  # the engine may close a handle after it has replied

    def __init__(self, engine: RolloutEngine | None, engine_ranks: list[int], timeout: float):
        self.engine, self.receivers, self.timeout = engine, list(engine_ranks), timeout

    def disconnect(self) -> None:
        """Do nothing: there is no connection."""

    def connect(self) -> None:
        """Do nothing: handles are sent with each bucket."""

    def start(self, bucket: NamedTensors, specs: Shapes, role: Role, doing: str) -> Sending:
        engine = self.engine
        return attempt(lambda: [engine.receive_tensors(bucket, role)] if engine and bucket else [], doing, self.timeout)
