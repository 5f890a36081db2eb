from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.actor.microbatch import micro_batches
from respec_trainer.rollout.batch import Batch


def make_batch(lengths: list[int], width: int) -> Batch:
    tokens = torch.arange(len(lengths) * width).view(len(lengths), width)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(tokens, mask, torch.tensor(lengths), tokens.float(), (tokens % 3).to(torch.int8))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 4), st.sampled_from((1, 2, 4)))
def test_every_row_comes_once_whole_and_no_wider_than_needed(lengths, size, multiple):
    batch = make_batch(lengths, width=12)
    seen = []
    for rows, micro in micro_batches(batch, size, multiple):
        width = micro.tokens.shape[1]
        assert len(micro) <= size
        assert width % multiple == 0
        assert 0 <= width - int(micro.lengths.max()) < multiple
        for field in ("tokens", "response_mask", "sampler_logprobs", "origins"):
            assert torch.equal(getattr(micro, field), getattr(batch, field)[rows, :width])
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_rows_of_like_length_are_together():
    groups = [rows.tolist() for rows, _ in micro_batches(make_batch([3, 9, 2, 8], width=9), 2)]
    assert groups == [[1, 3], [0, 2]]


def test_a_width_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple_of=2"):
        list(micro_batches(make_batch([3], width=5), 1, multiple_of=2))
