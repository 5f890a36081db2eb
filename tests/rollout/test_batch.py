"""rollout/batch.py: alignment of tokens, masks and log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.rollout.batch import collate, rows_of_rank
from respec_trainer.rollout.sample import Sample


def sample(prompt, response, logprobs=None, origins=()) -> Sample:
    logprobs = [-0.5 * (i + 1) for i in range(len(response))] if logprobs is None else logprobs
    return Sample("k", prompt, response, logprobs, "stop", "actor-0", "drafter-0", origins=list(origins))


def test_collate_aligns_every_entry_with_its_own_token():
    batch = collate([sample([5, 6], [7, 8, 9], origins=[0, 1, 2]), sample([4], [3])], pad_id=9)
    assert batch.origins.dtype == torch.int8
    assert batch.origins.tolist() == [[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [4, 3, 9, 9, 9]]
    assert batch.response_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -0.5, -1.0, -1.5], [0, -0.5, 0, 0, 0]]
    assert batch.lengths.tolist() == [5, 2]


def test_collate_rounds_the_length_up():
    for multiple, width in ((1, 3), (2, 4), (3, 3), (4, 4), (5, 5)):
        batch = collate([sample([1], [2, 3]), sample([1], [2])], pad_id=7, multiple_of=multiple)
        assert batch.tokens.tolist() == [[1, 2, 3] + [7] * (width - 3), [1, 2] + [7] * (width - 2)]
        assert batch.response_mask.sum(1).tolist() == [2, 1] and batch.lengths.tolist() == [3, 2]


@pytest.mark.parametrize(("minibatches", "dp"), [(1, 1), (1, 4), (2, 2), (4, 2), (3, 4)])
def test_minibatches_have_the_same_rows_on_any_number_of_ranks(minibatches, dp):
    total = 24
    parts = [np.array_split(rows_of_rank(total, minibatches, dp, rank), minibatches) for rank in range(dp)]
    for number, expected in enumerate(np.array_split(np.arange(total), minibatches)):
        found = [part[number].tolist() for part in parts]
        assert sum(found, []) == expected.tolist()
        assert {len(each) for each in found} == {total // minibatches // dp}


def test_rows_that_do_not_divide_are_refused():
    for total, minibatches, dp in (6, 2, 2), (9, 2, 1), (8, 1, 3):
        with pytest.raises(ValueError, match=f"{total} rows do not split into {minibatches} minibatches over {dp}"):
            rows_of_rank(total, minibatches, dp, 0)


def test_rows_keep_width():
    batch = collate([sample([1], [2, 3]), sample([1], [2]), sample([9], [8], origins=[2])], pad_id=0)
    part = batch.rows(slice(1, 3))
    assert len(part) == 2 and part.tokens.shape[1] == batch.tokens.shape[1]
    assert part.tokens[1, 0] == 9
    assert batch.rows(torch.tensor([2, 0])).tokens[:, 0].tolist() == [9, 1]
    assert part.origins.tolist() == [[0, 0, 0], [0, 2, 0]]


def test_rows_that_train_nothing_have_no_response_tokens():
    batch = collate([sample([1], [2, 3]), sample([1], [2]), sample([9], [8], origins=[2])], pad_id=0)
    part = batch.training_only(torch.tensor([True, False, True]))
    assert part.response_mask.tolist() == [[False, True, True], [False] * 3, [False, True, False]]
    assert torch.equal(part.tokens, batch.tokens) and torch.equal(part.lengths, batch.lengths)
    assert batch.response_mask[1].any(), "the batch itself is unchanged"


def test_logprobs_and_origins_must_match_the_response():
    with pytest.raises(ValueError, match="1 log-probs for 2"):
        collate([sample([1], [2, 3], [-1.0])], pad_id=0)
    with pytest.raises(ValueError, match="3 origins for 2"):
        collate([sample([1], [2, 3], origins=[0, 1, 1])], pad_id=0)
    with pytest.raises(ValueError, match="no samples"):
        collate([], pad_id=0)
