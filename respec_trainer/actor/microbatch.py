"""Cuts a batch into micro-batches for single forward passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from respec_trainer.rollout.batch import Batch


def micro_batches(batch: Batch, size: int, multiple_of: int = 1) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield (rows, micro-batch) of at most `size` rows, longest rows first, each cut to its longest row.

    Rows of similar length share a micro-batch, so it has little padding. `rows` [b] are the indices in the batch. The
    width of a micro-batch is its longest row rounded up to `multiple_of`, at most the batch's width. Raises ValueError
    if the batch's width is not a multiple of `multiple_of`.
    """
    width = batch.tokens.shape[1]
    if width % multiple_of:
        raise ValueError(
            f"the batch is {width} tokens wide; sequence parallelism over {multiple_of} ranks needs a multiple of "
            f"{multiple_of}: pass multiple_of={multiple_of} to collate"
        )
    for rows in batch.lengths.argsort(descending=True, stable=True).split(size):
        longest = int(batch.lengths[rows].max())
        yield rows, narrow(batch.rows(rows), min(width, -(-longest // multiple_of) * multiple_of))


def narrow(batch: Batch, width: int) -> Batch:
    """Return the first `width` positions of every row."""
    return Batch(
        batch.tokens[:, :width],
        batch.response_mask[:, :width],
        batch.lengths,
        batch.sampler_logprobs[:, :width],
        batch.origins[:, :width],
    )
