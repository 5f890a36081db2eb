"""Captures what a drafter learns from while the actor scores a batch: no pass of its own, and nothing on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from respec_trainer.capture import CapturedRow
from respec_trainer.rollout.batch import Batch


def vocabulary_rows(weight: torch.Tensor, ids: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Rows [n, H] of a vocabulary-parallel weight, this rank's part of it [V / tp, H], the same on every rank."""
    first = dist.get_rank(group) * len(weight)
    mine = (ids >= first) & (ids < first + len(weight))
    rows = torch.where(mine[:, None], weight[torch.where(mine, ids - first, 0)], 0)
    dist.all_reduce(rows, group=group)  # every row comes from one rank, the others add zeros: exact
    return rows


def captured_rows(
    index: torch.Tensor,
    micro: Batch,
    features: torch.Tensor,
    hidden: torch.Tensor,
    logsumexp: torch.Tensor,
    share: slice,
) -> list[CapturedRow]:
    """The rows of a micro-batch that are this rank's, on the host.

    Args:
        index: [b] where the micro-batch's rows stand in the batch. features: [b, S, 3H].
        hidden: [n, H], logsumexp: [n], of the micro-batch's response tokens, row by row.
        share: of the batch's rows; this rank's are those at its start, step by step.
    """
    mine = (index % share.step == share.start).nonzero()[:, 0]
    if not len(mine):
        return []
    on_device = mine.to(features.device)
    wide, counts = to_host(features[on_device]), micro.response_mask.sum(1).tolist()
    hiddens, sums = to_host(hidden).split(counts), to_host(logsumexp).split(counts)
    lengths = micro.lengths.tolist()
    return [
        CapturedRow(int(index[b]), wide[place, : lengths[b]].clone(), hiddens[b].clone(), sums[b].clone())
        for place, b in enumerate(mine.tolist())
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory; from a GPU by way of pinned memory."""
    if tensor.device.type != "cuda":
        return tensor.detach()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return pinned
