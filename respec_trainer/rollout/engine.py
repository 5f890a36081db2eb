"""RolloutEngine: what the trainer asks of an inference engine, and nothing else.

One engine holds two models, told apart by role: "target", the actor's weights, and "draft", the drafter's.
Every method raises EngineError when the engine refuses, dies or does not answer in time; none returns a status.
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
    """A weight on its way: its Hugging Face name, its dtype ("bfloat16", "float32", ...) and its shape."""

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
        """How many requests have finished so far."""

    @abstractmethod
    def delivered(self) -> list[Sample]:
        """What there is of each request, in the order submitted, after the engine died; "lost" if not finished."""


class RolloutEngine(ABC):
    @abstractmethod
    def start(self) -> None:
        """Launch the engine's processes and return once it answers."""

    @property
    @abstractmethod
    def failure(self) -> EngineError | None:
        """Why the engine is dead: no call will succeed until `shutdown` and `start`. None while it lives."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> Pending:
        """Hand over requests and return at once."""

    @abstractmethod
    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        """Make the engine's ranks members rank_offset, rank_offset + 1, ... of a new process group.

        Returns at once, because every member must be joining for the group to form; the Future resolves when it has.
        """

    @abstractmethod
    def leave_group(self, name: str) -> None:
        """Leave a group made by join_group; nothing happens if this life of the engine has not joined it."""

    @abstractmethod
    def weight_shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that an update of one model must bring; empty where they are not known."""

    @abstractmethod
    def begin_weight_update(self, role: Role, names: Collection[str] = ()) -> None:
        """Open a weight update of one model, of the tensors `names`; outside of one, weights are refused.

        Until it is ended the weights are neither the old nor the new ones, and requests are refused.
        """

    @abstractmethod
    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        """Receive these tensors from rank 0 of `group`, one broadcast each, in order. Resolves when they are loaded."""

    @abstractmethod
    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> Future:
        """Load tensors of this process, from one flat bucket of memory that both processes see.

        Returns at once; the Future resolves when they are loaded. The memory must stay as it is until then.
        """

    @abstractmethod
    def end_weight_update(self, role: Role, version: str) -> None:
        """Close the update and stamp later samples with `version`. No KV made with the old weights is used after it.

        Raises EngineError where a tensor that the update was opened for never arrived.
        """

    @abstractmethod
    def abort_weight_update(self) -> None:
        """Close an update that will not be completed, if one is open. What the model holds is undefined: `distrust`."""

    @abstractmethod
    def distrust(self, reason: str) -> None:
        """Refuse every request, for `reason`, until `trust`: the weights are not known to be whole."""

    @abstractmethod
    def trust(self) -> None:
        """Take requests again: the weights of both models are known to be whole."""

    @abstractmethod
    def digests(self, role: Role) -> dict[str, str]:
        """Digests of the weights that one model holds, by the name each is sent with; see `resync.proof`."""

    @abstractmethod
    def sleep(self) -> None:
        """Give back the memory of weights and KV cache, where there is a GPU. Nothing happens if it sleeps already."""

    @abstractmethod
    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take back that memory, in two stages; what it holds is undefined until the weights are pushed again.

        Nothing happens to a part that is awake.
        """

    @abstractmethod
    def take_decode_log(self) -> DecodeLog:
        """What the engine's batches did since the last call; empty where the engine logs none. Ask when it is idle."""

    @abstractmethod
    def restore_depth_chooser(self, state: str) -> None:
        """Let the policy of draft steps go on from the state that a log was taken with, while no request runs.

        Nothing happens where the steps are fixed.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """End every process of the engine. Safe to call twice."""

    def release(self) -> None:  # noqa: B027 - most engines leave nothing to release
        """Let go, for good, of whatever holds the engine, after `shutdown`; an engine of this process has no such."""
