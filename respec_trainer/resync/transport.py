"""How a bucket travels from trainer ranks to engine processes. Three ways, one interface.

gloo, nccl: one process group holds trainer rank 0 and every rank of every engine; rank 0 broadcasts.
cuda_ipc:   each engine's owner shares its GPU with the engine and hands over memory handles; nothing is copied between
            hosts or devices, and no communicator exists (two ranks of one NCCL communicator cannot share a GPU).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError, TransferError
from respec_trainer.network import free_port
from respec_trainer.resync.stream import NamedTensors
from respec_trainer.rollout.engine import Role, RolloutEngine, TensorSpec

POLL_SECONDS = 0.002


class Transport(ABC):
    """Carries buckets to the engines. Every trainer rank calls every method, in the same order."""

    receivers: list[int]  # global ranks that must hold the whole tensors of a bucket

    @abstractmethod
    def disconnect(self) -> None:
        """End the connection, where there is one; engines that died have left it already."""

    @abstractmethod
    def connect(self) -> None:
        """Make the connection to the engines; needed again, after `disconnect`, when an engine was restarted."""

    @abstractmethod
    def send(self, bucket: NamedTensors, role: Role) -> None:
        """Carry one bucket ([] on ranks that do not hold it) into every engine's `role` model."""


class BroadcastTransport(Transport):
    """Rank 0 broadcasts to all engines in one group, made over an explicit store.

    The store is explicit because torch's own rendezvous makes every rank a client under some launchers, and hangs.
    """

    def __init__(self, backend: str, engine: RolloutEngine | None, engine_ranks: list[int], config: Config, control):
        self.backend, self.engine, self.engine_ranks, self.control = backend, engine, engine_ranks, control
        self.engine_tp, self.settings = config.rollout.engine.tp, config.resync
        self.receivers = [0]
        self.rank = dist.get_rank()
        self.group, self.generation = None, 0

    def disconnect(self) -> None:
        if self.engine is not None:
            self.engine.leave_group(f"respec_resync_{self.generation}")
        if self.group is not None:
            # Its engines are gone or have left, so nothing in it waits. With it goes the store, and the store's port.
            dist.destroy_process_group(self.group)
            self.group = None

    def connect(self) -> None:
        self.generation += 1
        name = f"respec_resync_{self.generation}"
        place = [None]
        store = None
        world = 1 + len(self.engine_ranks) * self.engine_tp
        timeout = timedelta(seconds=self.settings.timeout)
        if self.rank == 0:
            address, port = _own_address(), self.settings.port or free_port()
            store = dist.TCPStore(address, port, world, True, timeout, wait_for_workers=False)
            place = [(address, port)]
        dist.broadcast_object_list(place, src=0, group=self.control)
        joined = None
        if self.engine is not None:
            offset = 1 + self.engine_ranks.index(self.rank) * self.engine_tp
            joined = self.engine.join_group(name, *place[0], world, offset, self.backend)
        if self.rank == 0:
            try:
                self.group = _make_group(name, store, world, self.backend, timeout)
            except RuntimeError as error:
                raise TransferError(f"the engines did not join the weight group: {error}") from error
        if joined is not None:
            _wait([joined], self.settings.timeout, "joining the weight group")

    def send(self, bucket: NamedTensors, role: Role) -> None:
        message = [[_spec(name, tensor) for name, tensor in bucket]]
        dist.broadcast_object_list(message, src=0, group=self.control)
        specs = message[0]
        if not specs:
            return
        loaded = [self.engine.receive_broadcast(specs, role, f"respec_resync_{self.generation}")] if self.engine else []
        works: list[dist.Work] = []
        if self.rank == 0:
            works = [dist.broadcast(tensor, src=0, group=self.group, async_op=True) for _, tensor in bucket]
        _wait([*loaded, *works], self.settings.timeout, f"carrying {len(specs)} {role} tensors")


class IPCTransport(Transport):
    """Each owner hands its engine handles to tensors on the GPU they share."""

    def __init__(self, engine: RolloutEngine | None, engine_ranks: list[int]):
        self.engine, self.receivers = engine, list(engine_ranks)

    def disconnect(self) -> None:
        """Nothing to disconnect."""

    def connect(self) -> None:
        """Nothing to connect: handles travel with each bucket."""

    def send(self, bucket: NamedTensors, role: Role) -> None:
        if self.engine is not None and bucket:
            self.engine.receive_tensors(bucket, role)


def setup_transport(config: Config, device: str, engine: RolloutEngine | None, engine_ranks: list[int], control):
    """The transport that `resync.transport` names, or for "auto" the one this topology needs.

    Engines share the trainer ranks' devices, so on GPUs the handles travel by CUDA IPC and on a CPU gloo broadcasts.
    Raises ConfigError for a transport that cannot work here.
    """
    choice = config.resync.transport
    if choice == "auto":
        choice = "cuda_ipc" if device == "cuda" else "gloo"
    if device == "cpu" and choice != "gloo":
        raise ConfigError(f"resync.transport={choice} needs GPUs; without one use gloo (or auto)")
    if device == "cuda" and choice == "nccl":
        raise ConfigError(
            "resync.transport=nccl needs engines on GPUs of their own: here engines share the trainer's GPUs, and two "
            "ranks of one NCCL communicator cannot share a GPU; use cuda_ipc (or auto)"
        )
    if choice == "cuda_ipc":
        return IPCTransport(engine, engine_ranks)
    return BroadcastTransport(choice, engine, engine_ranks, config, control)


def _make_group(name: str, store: dist.Store, world: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    # The engines make their side of the group with this same function, so both sides agree on the store's key prefixes.
    from sglang.srt.utils import init_custom_process_group

    return init_custom_process_group(
        backend=backend,
        store=dist.PrefixStore(name, store),
        timeout=timeout,
        world_size=world,
        rank=0,
        group_name=name,
    )


def _wait(pending: Sequence[Future | dist.Work], timeout: float, doing: str) -> None:
    """Wait for engine replies and broadcasts together, so that one side's failure is not waited for on the other."""
    deadline = time.monotonic() + timeout
    left = list(pending)
    while left:
        for item in [item for item in left if (item.done() if isinstance(item, Future) else item.is_completed())]:
            try:
                item.result() if isinstance(item, Future) else item.wait()
            except RuntimeError as error:
                raise TransferError(f"{doing}: {error}") from error
            left.remove(item)
        if left and time.monotonic() > deadline:
            raise TransferError(f"{doing}: {len(left)} of {len(pending)} parts did not finish within {timeout:.0f} s")
        if left:
            time.sleep(POLL_SECONDS)


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _own_address() -> str:
    """Where engines on other hosts reach this one: the address the launcher gave rank 0."""
    import os

    return os.environ.get("MASTER_ADDR", "127.0.0.1")
