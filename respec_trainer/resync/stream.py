"""Streams a model's weights out of tensor-parallel and ZeRO shards, in buckets of Hugging Face tensors.

Every rank iterates over the parameters in the same order. A bucket is first gathered over ZeRO-3's shards (a collective
of the data-parallel group), then over tensor parallelism with one grouped collective, then copied into one flat buffer
by the rules of `weights.hf_map`, in the dtype of the receiver. Tied weights are sent once; padded vocabulary rows are
not sent.

The stream supports double buffering: while one bucket is sent from one flat buffer, the next is gathered and copied
into the other. The memory of a rank for all of this is at most two buckets of the requested size. So the real buckets
are smaller, to leave room for their shards and for the weights that DeepSpeed gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from respec_trainer.errors import TransferError
from respec_trainer.resync.workspace import Workspace
from respec_trainer.weights.hf_map import copy_to_hf, hf_shapes, hf_views

NamedTensors = list[tuple[str, torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]
COLLECTIVE_SECONDS = 3600.0  # time limit if the caller gives none


@dataclass(frozen=True)
class Planned:
    """One parameter of a bucket, and the Hugging Face tensors it becomes."""

    name: str  # Megatron's
    parameter: torch.nn.Parameter
    sharded: bool  # over tensor parallelism
    shapes: Shapes


class Gathered:
    """A bucket with its shards, on ranks that want them. It is valid until the next bucket is requested."""

    def __init__(self, plan: Sequence[Planned], shards: list[list[torch.Tensor]] | None, hf_config, dtype: torch.dtype):
        self.plan, self.shards, self.hf_config, self.dtype = plan, shards, hf_config, dtype
        self.shapes: Shapes = {name: shape for planned in plan for name, shape in planned.shapes.items()}

    def copy(self, workspace: Workspace, flat: str = "bucket-0", views: bool = False) -> NamedTensors:
        """Return the bucket's tensors, copied into the buffer `flat`; [] on ranks that do not want them.

        With `views`, tensors that can be sent directly from the actor's parameters are not copied.
        """
        if self.shards is None:
            return []
        found = self._views() if views else {}
        out = flat_tensors({n: s for n, s in self.shapes.items() if n not in found}, self.dtype, workspace, flat)
        for planned, shards in zip(self.plan, self.shards, strict=True):
            if not found.keys() & planned.shapes.keys():
                copy_to_hf(planned.name, shards, self.hf_config, out)
        out |= found
        return [(name, out[name]) for name in self.shapes]

    def _views(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for planned, shards in zip(self.plan, self.shards, strict=True):
            if not planned.sharded and shards[0].dtype == self.dtype:
                found |= hf_views(planned.name, shards[0], self.hf_config) or {}
        return found


def numel_of(shapes: Shapes) -> int:
    """Return the number of elements of all tensors of these shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def flat_tensors(shapes: Shapes, dtype: torch.dtype, workspace: Workspace, flat: str) -> dict[str, torch.Tensor]:
    """Return tensors of these names and shapes, one after the other in the buffer `flat`."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = workspace.take(flat, sum(sizes), dtype).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class ActorStream:
    """The actor's weights as buckets. Every rank must iterate to the end, because each bucket runs collectives."""

    def __init__(
        self,
        actor,
        receivers: Sequence[int],
        bucket_bytes: int,
        dtype: torch.dtype,
        workspace: Workspace,
        timeout: float = COLLECTIVE_SECONDS,
        frozen: bool = True,
    ):
        """
        Args:
            actor: the `actor.engine.Actor`; its parameters carry `tensor_model_parallel` where they are sharded.
            receivers: global ranks that want the tensors. The same list on every rank.
            bucket_bytes: size of a bucket as it is sent; a larger parameter is a bucket of its own.
            timeout: seconds to wait for another rank's shards of a bucket.
            frozen: also stream parameters that are not trained.
        """
        self.actor, self.dtype, self.workspace, self.timeout = actor, dtype, workspace, timeout
        self.topology, self.zero3 = actor.topology, actor.engine.zero_optimization_stage() == 3
        group = dist.get_process_group_ranks(self.topology.tp_group)
        self.group, self.wanted = group, [rank for rank in group if rank in set(receivers)]
        parameters = [p for p in actor.engine.module.named_parameters() if frozen or p[1].requires_grad]
        plan = [self._plan(*pair) for pair in parameters]
        sizes = [numel_of(p.shapes) * dtype.itemsize for p in plan]
        self.buckets: list[list[Planned]] = cut(plan, sizes, int(bucket_bytes * self._share_of_memory()))

    @property
    def shapes(self) -> Shapes:
        """Name and shape of every tensor in the stream, on every rank."""
        return {name: shape for bucket in self.buckets for p in bucket for name, shape in p.shapes.items()}

    def __iter__(self) -> Iterator[Gathered]:
        self._reserve()
        for bucket in self.buckets:
            with deepspeed.zero.GatheredParameters([p.parameter for p in bucket], enabled=self.zero3):
                gathered = Gathered(bucket, self._gather(bucket), self.actor.hf_config, self.dtype)
                yield gathered
                gathered.shards = None  # frees their memory, even if the caller keeps the bucket

    def _share_of_memory(self) -> float:
        """Return the share of the requested bucket size to use, so that memory is at most two requested buckets."""
        if self.zero3:
            return 2 / 5  # two flat buffers, and DeepSpeed's gathered weights, for a short time three times their size
        return 1 if self.topology.tp == 1 else 2 / 3  # two flat buffers, with tensor parallelism also the shards

    def _reserve(self) -> None:
        """Take a buffer for the largest bucket's shards. If it grew later, views would keep the old one in memory."""
        shards = [[p.parameter for p in bucket if p.sharded] for bucket in self.buckets]
        if self.wanted and any(shards):
            largest = max(sum(p.ds_numel if self.zero3 else p.numel() for p in bucket) for bucket in shards)
            self.workspace.take("shards", largest * self._slots(), next(filter(None, shards))[0].dtype)

    def _slots(self) -> int:
        """Return how many ranks' shards of a bucket this rank's buffer holds: those received, and its own if sent."""
        receives, sends = self.topology.rank in self.wanted, set(self.wanted) - {self.topology.rank}
        return (self.topology.tp - 1 if receives else 0) + (1 if sends else 0)

    def _plan(self, name: str, parameter: torch.nn.Parameter) -> Planned:
        sharded = self.topology.tp > 1 and getattr(parameter, "tensor_model_parallel", False)
        shape = parameter.ds_shape if self.zero3 else parameter.shape
        tp = self.topology.tp if sharded else 1
        return Planned(name, parameter, sharded, hf_shapes(name, shape, self.actor.hf_config, tp))

    def _gather(self, bucket: Sequence[Planned]) -> list[list[torch.Tensor]] | None:
        """Return all shards of each parameter, in tensor-parallel order, on the wanted ranks; None on the others."""
        if not self.wanted:
            return None
        own = [planned.parameter.detach() for planned in bucket if planned.sharded]
        flats = self._gather_flat(own, bucket) if own else {}
        if self.topology.rank not in self.wanted:
            return None
        sizes = [shard.numel() for shard in own]
        parts = {rank: iter(flat.split(sizes)) for rank, flat in flats.items()}
        mine = iter(own)
        out = []
        for planned in bucket:
            whole = planned.parameter.detach()
            if planned.sharded:
                next(mine)
                out.append([next(parts[r]).view_as(whole) if r in parts else whole for r in self.group])
            else:
                out.append([whole])
        return out

    def _gather_flat(self, own: list[torch.Tensor], bucket: Sequence[Planned]) -> dict[int, torch.Tensor]:
        """Send this rank's shards to ranks that want them; return the other ranks' shards, flat, if this rank does.

        The keys are global ranks. Uses messages between two ranks, because torch's gather copies everything under gloo.
        """
        numel, rank, tp_group = sum(shard.numel() for shard in own), self.topology.rank, self.topology.tp_group
        slots = self.workspace.take("shards", numel * self._slots(), own[0].dtype).view(self._slots(), numel)
        others = [other for other in self.group if other != rank]
        received = dict(zip(others, slots, strict=False)) if rank in self.wanted else {}
        ops = [dist.P2POp(dist.irecv, slot, other, tp_group) for other, slot in received.items()]
        takers = [other for other in others if other in self.wanted]
        if takers:
            mine = torch.cat([shard.reshape(-1) for shard in own], out=slots[-1])
            ops += [dist.P2POp(dist.isend, mine, other, tp_group) for other in takers]
        self._carry_out(ops, bucket)
        return received

    def _carry_out(self, ops: list[dist.P2POp], bucket: Sequence[Planned]) -> None:
        peer = ops[0].peer
        try:
            works = dist.batch_isend_irecv(ops)  # NCCL returns one for all of them
            for op, work in zip(ops, works, strict=False):
                peer = op.peer
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            names = [name for planned in bucket for name in planned.shapes]
            raise TransferError(
                f"rank {peer} did not take part within {self.timeout:.0f} s (resync.timeout) in gathering {names[0]} "
                f"to {names[-1]}: {error}"
            ) from error


class Whole:
    """A bucket of tensors that every rank has, copied only where they are wanted."""

    def __init__(self, tensors: NamedTensors, wanted: bool, dtype: torch.dtype):
        self.tensors, self.wanted, self.dtype = tensors, wanted, dtype
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in tensors}

    def copy(self, workspace: Workspace, flat: str = "bucket-0", views: bool = False) -> NamedTensors:
        """Return copies of the tensors, like `Gathered.copy`; `views` is ignored."""
        if not self.wanted:
            return []
        out = flat_tensors(self.shapes, self.dtype, workspace, flat)
        for name, tensor in self.tensors:
            out[name].copy_(tensor.detach())
        return list(out.items())


class WholeStream:
    """Tensors that every rank has, as buckets, with the interface of an ActorStream."""

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]], wanted: bool, bucket_bytes: int, dtype: torch.dtype):
        named = list(named)
        sizes = [tensor.numel() * dtype.itemsize for _, tensor in named]
        self.buckets = [Whole(part, wanted, dtype) for part in cut(named, sizes, bucket_bytes)]

    @property
    def shapes(self) -> Shapes:
        return {name: shape for bucket in self.buckets for name, shape in bucket.shapes.items()}

    def __iter__(self) -> Iterator[Whole]:
        yield from self.buckets


def cut(items: Sequence, sizes: Sequence[int], limit: int) -> list[list]:
    """Divide items into runs of neighbors whose sizes add up to at most `limit`; a larger item is alone."""
    parts: list[list] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if not parts or held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size
    return parts
