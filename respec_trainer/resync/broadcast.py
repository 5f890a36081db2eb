"""Weight transfer by broadcast over gloo or NCCL, in one process group of trainer rank 0 and all engine ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from respec_trainer.collectives import broadcast
from respec_trainer.config import Config
from respec_trainer.dtypes import DTYPES, long_name
from respec_trainer.errors import TransferError
from respec_trainer.resync.stream import NamedTensors, Shapes
from respec_trainer.resync.transport import Sending, Transport, attempt
from respec_trainer.rollout.engine import Role, RolloutEngine, TensorSpec


class BroadcastTransport(Transport):
    """Rank 0 broadcasts to all engines in one group, made with an explicit store.

    The store is explicit because under some launchers torch's own rendezvous makes every rank a client, and hangs.
    """

    takes_views = True

    def __init__(self, backend: str, engine: RolloutEngine | None, engine_ranks: list[int], config: Config, control):
        self.backend, self.engine, self.engine_ranks, self.control = backend, engine, engine_ranks, control
        self.engine_tp, self.settings = config.rollout.engine.tp, config.resync
        self.dtype = long_name(DTYPES[config.model.dtype])
        self.receivers = [0]
        self.rank = dist.get_rank()
        self.group, self.generation = None, 0

    @property
    def name(self) -> str:
        return f"respec_resync_{self.generation}"

    def disconnect(self) -> None:
        if self.engine is not None:
            self.engine.leave_group(self.name)
        if self.group is not None:
            # Its engines are gone or have left, so no process waits in it. This also frees the store and its port.
            dist.destroy_process_group(self.group)
            self.group = None

    def connect(self) -> None:
        self.generation += 1
        endpoint, store = None, None
        world = 1 + len(self.engine_ranks) * self.engine_tp
        timeout = timedelta(seconds=self.settings.timeout)
        if self.rank == 0:
            address = _address_of_rank_0()
            store = dist.TCPStore(address, self.settings.port or 0, world, True, timeout, wait_for_workers=False)
            endpoint = address, store.port
        endpoint = broadcast(endpoint, group=self.control)
        joined: Sequence[Future] = []
        if self.engine is not None:
            offset = 1 + self.engine_ranks.index(self.rank) * self.engine_tp
            joined = [self.engine.join_group(self.name, *endpoint, world, offset, self.backend)]
        if self.rank == 0:
            try:
                self.group = _make_group(self.name, store, world, self.backend, timeout)
            except RuntimeError as error:
                raise TransferError(f"the engines did not join the weight group: {error}") from error
        Sending("joining the weight group", self.settings.timeout, joined).wait()

    def start(self, bucket: NamedTensors, specs: Shapes, role: Role, doing: str) -> Sending:
        return attempt(lambda: self._start(bucket, specs, role), doing, self.settings.timeout)

    def _start(self, bucket: NamedTensors, specs: Shapes, role: Role) -> list[Future | dist.Work]:
        pending: list[Future | dist.Work] = []
        if self.engine is not None:
            wanted = [TensorSpec(name, self.dtype, shape) for name, shape in specs.items()]
            pending.append(self.engine.receive_broadcast(wanted, role, self.name))
        if self.rank == 0:
            pending += [dist.broadcast(tensor, src=0, group=self.group, async_op=True) for _, tensor in bucket]
        return pending


def _make_group(name: str, store: dist.Store, world: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    # The engines use the same function for their side of the group, so both use the same key prefixes in the store.
    from sglang.srt.utils import init_custom_process_group

    return init_custom_process_group(
        backend=backend,
        store=dist.PrefixStore(name, store),
        timeout=timeout,
        world_size=world,
        rank=0,
        group_name=name,
    )


def _address_of_rank_0() -> str:
    """Return the address at which engines on other hosts reach this host: the launcher's address of rank 0."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
