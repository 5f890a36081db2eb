"""Stream a model's weights out of tensor-parallel and ZeRO shards as (Hugging Face name, tensor) buckets.

Every rank walks the parameters in the same order. A bucket is first made whole over ZeRO-3's shards (a collective of
the data-parallel group), then gathered over tensor parallelism with one collective, then renamed and reshaped by the
rules of `checkpoint.hf_map`. Tied weights come once; padded vocabulary rows never come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import deepspeed
import torch
import torch.distributed as dist

from respec_trainer.checkpoint.hf_map import to_hf

NamedTensors = list[tuple[str, torch.Tensor]]


def stream_actor(actor, receivers: Sequence[int], bucket_bytes: int) -> Iterator[NamedTensors]:
    """Yield the actor's weights in buckets of about `bucket_bytes`, whole on the ranks in `receivers`, [] elsewhere.

    Args:
        actor: the `actor.engine.Actor`; its parameters carry `tensor_model_parallel` where they are sharded.
        receivers: global ranks that want the tensors. The same list on every rank.
        bucket_bytes: size of a bucket as gathered, over all tensor-parallel ranks; a larger parameter is its own.

    Every rank must iterate to the end: each bucket holds collectives. Tensors are in the model's dtype, on its device,
    and valid until the next bucket is asked for.
    """
    topology, zero3 = actor.topology, actor.engine.zero_optimization_stage() == 3
    wanted = [rank for rank in dist.get_process_group_ranks(topology.tp_group) if rank in set(receivers)]
    for bucket in _buckets(actor.engine.module.named_parameters(), bucket_bytes // topology.tp, zero3):
        with deepspeed.zero.GatheredParameters([p for _, p in bucket], enabled=zero3):
            shards = _gather_shards(bucket, topology, wanted) if wanted else None
            out: NamedTensors = []
            if shards is not None:
                for name, parts in shards:
                    out += to_hf(name, parts, actor.hf_config)
            yield out


def _buckets(named: Iterable, limit: int, zero3: bool) -> Iterator[list]:
    bucket, held = [], 0
    for name, parameter in named:
        numel = parameter.ds_numel if zero3 else parameter.numel()
        size = numel * parameter.element_size()
        if bucket and held + size > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, parameter))
        held += size
    if bucket:
        yield bucket


def _gather_shards(bucket: list, topology, wanted: list[int]) -> list[tuple[str, list[torch.Tensor]]] | None:
    """All shards of each parameter of the bucket, in tensor-parallel order, on the wanted ranks; None on the others.

    A replicated parameter has one shard. With one wanted rank only that rank pays for the whole bucket.
    """
    sharded = [p.detach() for _, p in bucket if topology.tp > 1 and getattr(p, "tensor_model_parallel", False)]
    received = _gather_flat(torch.cat([p.reshape(-1) for p in sharded]), topology, wanted) if sharded else []
    if topology.rank not in wanted:
        return None
    parts = [iter(flat.split([p.numel() for p in sharded])) for flat in received]
    out = []
    for name, parameter in bucket:
        if topology.tp > 1 and getattr(parameter, "tensor_model_parallel", False):
            out.append((name, [next(part).view_as(parameter) for part in parts]))
        else:
            out.append((name, [parameter.detach().clone()]))
    return out


def _gather_flat(flat: torch.Tensor, topology, wanted: list[int]) -> list[torch.Tensor]:
    if len(wanted) > 1:
        received = [torch.empty_like(flat) for _ in range(topology.tp)]
        dist.all_gather(received, flat, group=topology.tp_group)
        return received
    received = [torch.empty_like(flat) for _ in range(topology.tp)] if topology.rank == wanted[0] else None
    dist.gather(flat, received, dst=wanted[0], group=topology.tp_group)
    return received or []
