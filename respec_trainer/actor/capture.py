"""Captures the drafter's training data while the actor scores a batch: without another pass, into host memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from respec_trainer.capture import CapturedRow
from respec_trainer.rollout.batch import Batch


def vocabulary_rows(weight: torch.Tensor, ids: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return rows `ids` [n, H] of a vocabulary-parallel weight, the same on every rank.

    `weight` is this rank's part [V / tp, H].
    """
    first = dist.get_rank(group) * len(weight)
    mine = (ids >= first) & (ids < first + len(weight))
    rows = torch.where(mine[:, None], weight[torch.where(mine, ids - first, 0)], 0)
    dist.all_reduce(rows, group=group)  # exact: one rank adds each row, the others add zeros
    return rows


def captured_rows(
    index: torch.Tensor,
    micro: Batch,
    features: torch.Tensor,
    hidden: torch.Tensor,
    logsumexp: torch.Tensor,
    share: slice,
) -> list[CapturedRow]:
    """Return this rank's rows of a micro-batch, in host memory.

    Args:
        index: [b], the indices of the micro-batch's rows in the batch.
        features: [b, S, 3H].
        hidden, logsumexp: [n, H] and [n], for the micro-batch's response tokens, row by row.
        share: selects this rank's rows of the batch; a slice without a stop.
    """
    mine = (index % share.step == share.start).nonzero()[:, 0]
    if not len(mine):
        return []
    on_device = mine.to(features.device)
    wide, counts = to_host(features[on_device]), micro.response_mask.sum(1).tolist()
    hiddens, sums = to_host(hidden).split(counts), to_host(logsumexp).split(counts)
    lengths = micro.lengths.tolist()
    return [
        CapturedRow(int(index[b]), wide[i, : lengths[b]].clone(), hiddens[b].clone(), sums[b].clone())
        for i, b in enumerate(mine.tolist())
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in host memory; a GPU tensor is copied into pinned memory."""
    if tensor.device.type != "cuda":
        return tensor.detach()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return pinned
