"""Batch: samples as tensors, B rows of S positions, right-padded because Megatron's RoPE counts from the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from respec_trainer.rollout.sample import Sample


@dataclass
class Batch:
    """Tensors of some samples for the actor. Entry t of a row belongs to token t, never to the token after it."""

    tokens: torch.Tensor  # [B, S] int64, prompt then response then padding
    response_mask: torch.Tensor  # [B, S] bool, True on response tokens
    lengths: torch.Tensor  # [B] int64, prompt and response
    sampler_logprobs: torch.Tensor  # [B, S] float32, 0 outside the response
    origins: torch.Tensor  # [B, S] int8, as Sample.origins; 0 outside the response

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: slice | torch.Tensor) -> Batch:
        """The chosen rows, at the same padded length."""
        return Batch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def training_only(self, rows: torch.Tensor) -> Batch:
        """Return the batch with an empty response mask, which no loss counts, in rows where `rows` [B] is False."""
        return replace(self, response_mask=self.response_mask & rows[:, None])

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def rows_of_rank(total: int, minibatches: int, dp: int, dp_rank: int) -> list[int]:
    """Return the rows of a step that one data-parallel rank trains on, in order: its part of each minibatch.

    A minibatch has the same `total` / `minibatches` consecutive rows whatever the number of ranks; each rank takes an
    equal part. Raises ValueError if they do not divide.
    """
    if total % (minibatches * dp):
        raise ValueError(f"{total} rows do not split into {minibatches} minibatches over {dp} data-parallel ranks")
    size = total // minibatches
    share = size // dp
    firsts = range(dp_rank * share, total, size)
    return [row for first in firsts for row in range(first, first + share)]


def collate(samples: Sequence[Sample], pad_id: int, multiple_of: int = 1) -> Batch:
    """Right-pad samples to their longest, rounded up to `multiple_of`: sequence parallelism splits S over its ranks.

    Raises ValueError for an empty list and for a sample whose log-probs or origins do not match its response.
    """
    if not samples:
        raise ValueError("no samples to collate")
    lengths = torch.tensor([len(s.prompt_ids) + len(s.response_ids) for s in samples])
    width = -(-int(lengths.max()) // multiple_of) * multiple_of
    tokens = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    logprobs = torch.zeros(len(samples), width)
    origins = torch.zeros(len(samples), width, dtype=torch.int8)
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt_ids), int(lengths[row])
        check_lists(sample)
        tokens[row, :end] = torch.tensor(sample.prompt_ids + sample.response_ids)
        mask[row, start:end] = True
        logprobs[row, start:end] = torch.tensor(sample.sampler_logprobs)
        if sample.origins:
            # Converting through bytes is several times faster than building a tensor from a list.
            origins[row, start:end] = torch.frombuffer(bytearray(sample.origins), dtype=torch.int8)
    return Batch(tokens, mask, lengths, logprobs, origins)


def check_lists(sample: Sample) -> None:
    """Raise ValueError if a list over the response's tokens has another length; origins may be empty."""
    tokens = len(sample.response_ids)
    if len(sample.sampler_logprobs) != tokens:
        raise ValueError(f"sample {sample.key}: {len(sample.sampler_logprobs)} log-probs for {tokens} response tokens")
    if sample.origins and len(sample.origins) != tokens:
        raise ValueError(f"sample {sample.key}: {len(sample.origins)} origins for {tokens} response tokens")
