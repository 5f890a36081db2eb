"""Cut a batch into micro-batches that fit one forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from respec_trainer.rollout.batch import Batch


def micro_batches(batch: Batch, size: int, multiple_of: int = 1) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield (rows, micro-batch) of at most `size` rows, longest rows first, each cut to its longest row.

    Rows of like length share a micro-batch, so little of it is padding. `rows` [b] says where they came from. A
    micro-batch is as wide as its longest row rounded up to `multiple_of`, or as the batch if that is less; raises
    ValueError if the batch's own width is no multiple.
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
    """The first `width` positions of every row."""
    return Batch(
        batch.tokens[:, :width],
        batch.response_mask[:, :width],
        batch.lengths,
        batch.sampler_logprobs[:, :width],
        batch.origins[:, :width],
    )
