"""Transports, which send buckets from trainer ranks to engine processes: their interface and their selection.

gloo, nccl: trainer rank 0 broadcasts in one process group with every rank of every engine (`broadcast.py`).
cuda_ipc:   each engine's owner shares its GPU with the engine and sends memory handles; nothing is copied between hosts
            or devices, and there is no communicator (`ipc.py`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Literal

import torch.distributed as dist

from respec_trainer.errors import ConfigError, EngineError, TransferError
from respec_trainer.resync.stream import NamedTensors, Shapes
from respec_trainer.rollout.engine import Role

POLL_SECONDS = 0.002


class Sending:
    """A bucket that is being sent. Its tensors must not change until `wait` returns."""

    def __init__(self, doing: str, timeout: float, pending: Sequence[Future | dist.Work] = (), error=None):
        """`error`: an error of the start; raised by `wait`, because only there all ranks learn of errors."""
        self.doing, self.timeout, self.pending, self.error = doing, timeout, list(pending), error
        self.deadline = time.monotonic() + timeout

    def wait_sent(self) -> None:
        """Return when this rank has sent the bucket; engines may still be loading it. Raises nothing."""
        while not all(item.is_completed() for item in self.pending if not isinstance(item, Future)):
            if time.monotonic() > self.deadline:
                return  # `wait` raises the error
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Return when engines have loaded the bucket. Raises EngineError if one refuses, TransferError after `timeout`.

        Replies and broadcasts are polled together, so that a failure of one is seen while the other still waits.
        """
        if self.error is not None:
            raise type(self.error)(f"{self.doing}: {self.error}") from self.error
        while self.pending:
            for item in [item for item in self.pending if _is_done(item)]:
                self._settle(item)
                self.pending.remove(item)
            if self.pending and time.monotonic() > self.deadline:
                raise TransferError(f"{self.doing}: not complete within {self.timeout:.0f} s (resync.timeout)")
            if self.pending:
                time.sleep(POLL_SECONDS)

    def _settle(self, item: Future | dist.Work) -> None:
        try:
            item.result() if isinstance(item, Future) else item.wait()
        except EngineError as error:
            raise EngineError(f"{self.doing}: {error}") from error
        except RuntimeError as error:
            raise TransferError(f"{self.doing}: {error}") from error


class Transport(ABC):
    """Sends buckets to the engines. Every trainer rank calls every method, in the same order."""

    receivers: list[int]  # global ranks that must hold the whole tensors of a bucket
    takes_views: bool  # whether tensors may be views of parameters; if not, a bucket needs its own new flat buffer

    @abstractmethod
    def disconnect(self) -> None:
        """End the connection, if there is one; engines that died have left it already."""

    @abstractmethod
    def connect(self) -> None:
        """Connect to the engines. After a restart of an engine, call `disconnect` and then this method again."""

    @abstractmethod
    def start(self, bucket: NamedTensors, specs: Shapes, role: Role, doing: str) -> Sending:
        """Start to send one bucket ([] on ranks that do not hold it) to every engine's `role` model.

        `specs` are the bucket's names and shapes, on every rank; `doing` describes the transfer in errors. Raises
        nothing: errors are raised by `wait`.
        """


def attempt(start, doing: str, timeout: float) -> Sending:
    """Return a Sending for the pending operations that `start()` returns, or for the error that it raises."""
    try:
        return Sending(doing, timeout, start())
    except (EngineError, RuntimeError) as error:
        return Sending(doing, timeout, error=error if isinstance(error, EngineError) else TransferError(str(error)))


def choose(wanted: str, device: str, shared_gpu: bool) -> Literal["gloo", "nccl", "cuda_ipc"]:
    """Return the transport that `resync.transport` names; for "auto" the best one.

    `shared_gpu`: each engine shares its owner's GPU. Raises ConfigError for a transport that cannot work.
    """
    if wanted == "auto":
        return "gloo" if device == "cpu" else "cuda_ipc" if shared_gpu else "nccl"
    if device == "cpu" and wanted != "gloo":
        raise ConfigError(f"resync.transport={wanted} needs GPUs; without one use gloo (or auto)")
    if wanted == "nccl" and shared_gpu:
        raise ConfigError(
            "resync.transport=nccl needs engines on GPUs of their own: here engines share the trainer's GPUs, and two "
            "ranks of one NCCL communicator cannot share a GPU; use cuda_ipc (or auto)"
        )
    if wanted == "cuda_ipc" and not shared_gpu:
        raise ConfigError(
            "resync.transport=cuda_ipc needs engines on their owners' GPUs: memory handles do not reach further; "
            "use nccl (or auto)"
        )
    return wanted


def setup_transport(config, device: str, engine, engine_ranks: list[int], control) -> Transport:
    """Return the transport for this configuration, not connected yet. `engine_ranks`: the owners of engines."""
    from respec_trainer.resync.broadcast import BroadcastTransport
    from respec_trainer.resync.ipc import IPCTransport

    shared_gpu = device == "cuda" and config.rollout.placement == "colocated"
    choice = choose(config.resync.transport, device, shared_gpu)
    if choice == "cuda_ipc":
        return IPCTransport(engine, engine_ranks, config.resync.timeout)
    return BroadcastTransport(choice, engine, engine_ranks, config, control)


def _is_done(item: Future | dist.Work) -> bool:
    return item.done() if isinstance(item, Future) else item.is_completed()
