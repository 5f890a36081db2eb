"""Plan the role and host of each rank: tensor and data parallelism, engines by span, devices, transports.

Ranks are numbered host by host, as every launcher does: host 0 has ranks 0 .. n-1, host 1 the next n.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.placement import Placement, check_world
from respec_trainer.processes import local_size
from respec_trainer.resync.transport import choose

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Cluster:
    """The machines of a run: `hosts` with `ranks_per_host` ranks each; on "cuda" every rank has its own device."""

    hosts: int
    ranks_per_host: int
    device: Device

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    @classmethod
    def of_launcher(cls, device: Device) -> Cluster | None:
        """Return the cluster by the launcher's environment variables; None if no launcher started this process.

        Raises ConfigError if hosts cannot all have the same number of ranks.
        """
        if "WORLD_SIZE" not in os.environ:
            return None
        world, per_host = int(os.environ["WORLD_SIZE"]), local_size()
        if world % per_host:
            raise ConfigError(
                f"the {per_host} ranks on this host do not divide all {world} ranks: give every host the same number "
                "(slots in the hostfile)"
            )
        return cls(world // per_host, per_host, device)


@dataclass(frozen=True)
class RankPlace:
    """The host, device and roles of one rank. `starts` is the engine it starts, `feeds` the one it sends requests to.

    tp_rank and dp_rank are None if the rank does not train. `engine` is the engine that runs on the rank's device, None
    if the rank only trains.
    """

    rank: int
    host: int
    device: str  # "cuda:3" of its host, or "cpu"
    tp_rank: int | None
    dp_rank: int | None
    engine: int | None
    starts: int | None
    feeds: int | None


@dataclass(frozen=True)
class Layout:
    """The places of all ranks, and how weights reach the engines."""

    cluster: Cluster
    placement: Placement
    ranks: tuple[RankPlace, ...]
    tp: int
    transport: Literal["gloo", "nccl", "cuda_ipc"]

    @property
    def dp(self) -> int:
        return self.placement.trainers // self.tp

    @property
    def colocated(self) -> bool:
        """True if engines and trainer take turns on the same devices."""
        return not self.placement.engine_ranks


def plan_layout(config: Config, cluster: Cluster) -> Layout:
    """Plan the places of a cluster's ranks. Raises ConfigError, with the reason, if the configuration does not fit."""
    check_world(config, cluster.world_size)
    placement, tp = Placement.of(config, cluster.world_size), config.actor.parallel.tp
    if cluster.device == "cuda":
        check_hosts_hold_groups(cluster, placement, tp, config.rollout.engine.tp)
    shared = cluster.device == "cuda" and not placement.engine_ranks
    transport = choose(config.resync.transport, cluster.device, shared)
    places = tuple(_place(rank, cluster, placement, tp) for rank in range(cluster.world_size))
    return Layout(cluster, placement, places, tp, transport)


def check_hosts_hold_groups(cluster: Cluster, placement: Placement, tp: int, engine_tp: int) -> None:
    """Raise ConfigError if a tensor-parallel group or an engine would reach over hosts, or if engines would share GPUs.

    This matters for GPUs only: tensor parallelism needs the fast links inside a host, and an engine starts its
    processes on one host.
    """
    per_host, span = cluster.ranks_per_host, placement.span
    if per_host % tp and placement.trainers > per_host:
        raise ConfigError(
            f"actor.parallel.tp={tp} does not divide the {per_host} GPUs of a host: tensor-parallel groups would reach "
            f"over hosts, whose links are too slow for it; set it to a divisor of {per_host}"
        )
    for first in placement.engine_launchers:
        if first // per_host != (first + span - 1) // per_host:
            raise ConfigError(
                f"rollout.engine.span={span}: the engine of ranks {first} to {first + span - 1} would reach over hosts "
                f"of {per_host} GPUs, but it runs on one; set it to a divisor of {per_host}"
            )
    if span < engine_tp:
        raise ConfigError(
            f"rollout.engine.tp={engine_tp} is more GPUs than the {span} of an engine's span: engines would share "
            f"GPUs; set rollout.engine.span={engine_tp}, or leave it out"
        )


def _place(rank: int, cluster: Cluster, placement: Placement, tp: int) -> RankPlace:
    host, local = divmod(rank, cluster.ranks_per_host)
    device = f"cuda:{local}" if cluster.device == "cuda" else "cpu"
    tp_rank, dp_rank = (rank % tp, rank // tp) if placement.trains(rank) else (None, None)
    first = placement.engine_launchers[0]
    engine = (rank - first) // placement.span if rank >= first else None
    starts = placement.engine_launchers.index(rank) if rank in placement.engine_launchers else None
    feeds = placement.owners.index(rank) if rank in placement.owners else None
    return RankPlace(rank, host, device, tp_rank, dp_rank, engine, starts, feeds)
