"""RolloutEngine: the interface between the trainer and an inference engine.

An engine holds two models, distinguished by role: "target" with the actor's weights, and "draft" with the drafter's.
Every method raises EngineError if the engine refuses, dies or does not answer in time; none returns a status.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.sample import Request, Sample

Role = Literal["target", "draft"]


@dataclass(frozen=True)
class TensorSpec:
    """Description of a weight to be sent: its Hugging Face name, dtype ("bfloat16", "float32", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Pending(ABC):
    """Requests the engine is working on."""

    @abstractmethod
    def collect(self) -> list[Sample]:
        """Wait for every request and return its Sample, in the order submitted."""

    @abstractmethod
    def done(self) -> int:
        """Return the number of requests that have finished so far."""

    @abstractmethod
    def delivered(self) -> list[Sample]:
        """Return each request's tokens, in the order submitted, after the engine died; "lost" if not finished."""


class RolloutEngine(ABC):
    @abstractmethod
    def start(self) -> None:
        """Launch the engine's processes and return once it answers."""

    @property
    @abstractmethod
    def failure(self) -> EngineError | None:
        """The error that ended the engine, or None while it runs. After one, only `shutdown` and then `start` help."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> Pending:
        """Submit requests and return at once."""

    @abstractmethod
    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        """Make the engine's ranks members rank_offset, rank_offset + 1, ... of a new process group.

        Returns at once, because every member must be joining for the group to form; the Future resolves when it has.
        """

    @abstractmethod
    def leave_group(self, name: str) -> None:
        """Leave a group made by join_group. Do nothing if the engine has not joined it since it last started."""

    @abstractmethod
    def weight_shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the weights that an update of one model must contain; empty if unknown."""

    @abstractmethod
    def begin_weight_update(self, role: Role, names: Collection[str] = ()) -> None:
        """Open a weight update of one model, of the tensors `names`; outside an update, weights are refused.

        Until the update ends, the weights are neither the old nor the new ones, and requests are refused.
        """

    @abstractmethod
    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        """Receive these tensors from rank 0 of `group`, one broadcast each, in order. Resolves once they are loaded."""

    @abstractmethod
    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> Future:
        """Load tensors of this process, from one flat buffer in memory that both processes share.

        Returns at once; the Future resolves when they are loaded. The memory must not change until then.
        """

    @abstractmethod
    def end_weight_update(self, role: Role, version: str) -> None:
        """Close the update and mark later samples with `version`. KV cache entries of the old weights are dropped.

        Raises EngineError if a tensor that was named when the update was opened never arrived.
        """

    @abstractmethod
    def abort_weight_update(self) -> None:
        """Close an open update that will not be completed. Then the weights are undefined: call `distrust`."""

    @abstractmethod
    def distrust(self, reason: str) -> None:
        """Refuse every request until `trust`, with `reason` in the error: the weights may be incomplete."""

    @abstractmethod
    def trust(self) -> None:
        """Accept requests again: the weights of both models are complete."""

    @abstractmethod
    def digests(self, role: Role) -> dict[str, str]:
        """Return digests of one model's weights, by the name under which each is sent; see `resync.proof`."""

    @abstractmethod
    def sleep(self) -> None:
        """Release the GPU memory of weights and KV cache. Do nothing on a CPU, or if it is released already."""

    @abstractmethod
    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate one part of that memory again; its content is undefined until the weights are pushed again.

        Do nothing for a part that has its memory.
        """

    @abstractmethod
    def take_decode_log(self) -> DecodeLog:
        """Return the log of the batches since the last call; empty if there is none. Call it on an idle engine."""

    @abstractmethod
    def restore_depth_chooser(self, state: str) -> None:
        """Restore the depth chooser from `DecodeLog.state`, while no request runs.

        Do nothing if the draft steps never change.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End every process of the engine. Safe to call twice."""

    def release(self) -> None:  # noqa: B027 - most engines have nothing to release
        """Release the engine's host after `shutdown`, for good. An engine of this process has no host."""
