"""drafter/batch.py: padding, counting, batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from respec_trainer.drafter.batch import DrafterBatch
from tests.support.drafters import random_rollouts

PAIRS = [([5, 6], [7, 8, 9]), ([4], [3])]


def test_collate():
    rollouts = DrafterBatch.collate(PAIRS, pad_id=1)
    assert rollouts.tokens.tolist() == [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1]]
    assert rollouts.response_mask.long().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert rollouts.weights.tolist() == [1.0, 1.0]
    assert rollouts.rows(torch.tensor([1])).tokens.tolist() == [[4, 3]]


def test_counts_are_of_responses_alone():
    counts = DrafterBatch.collate(PAIRS).token_counts(12)
    assert counts.nonzero().flatten().tolist() == [3, 7, 8, 9] and counts.sum() == 4 and len(counts) == 12


def test_batches_hold_every_row_once_with_little_padding():
    lengths = [(2, 1 + i * 7 % 23) for i in range(23)]
    rollouts = random_rollouts(lengths)
    batches = list(rollouts.batches(4, torch.Generator().manual_seed(0)))
    assert sorted(len(b) for b in batches) == [3, 4, 4, 4, 4, 4]
    rows = [
        tuple(t[: int(m.sum()) + 2].tolist()) for b in batches for t, m in zip(b.tokens, b.response_mask, strict=True)
    ]
    expected = [tuple(t[: n + 2].tolist()) for t, (_, n) in zip(rollouts.tokens, lengths, strict=True)]
    assert sorted(rows) == sorted(expected)
    for batch in batches:
        counts = batch.response_mask.sum(1)
        assert counts.max() - counts.min() <= 3 and batch.tokens.shape[1] == counts.max() + 2


def test_batches_can_be_fair_samples_of_the_rows():
    rollouts = random_rollouts([(2, 1)] * 32 + [(2, 9)] * 32)
    batches = list(rollouts.batches(16, torch.Generator().manual_seed(0), by_length=False))
    lengths = [batch.response_mask.sum(1) for batch in batches]
    assert sorted(torch.cat(lengths).tolist()) == [1] * 32 + [9] * 32
    assert all(len(set(length.tolist())) == 2 for length in lengths)


def test_epochs_differ_and_seeds_repeat():
    rollouts = random_rollouts([(2, 3)] * 16)

    def order(generator):
        return torch.cat([b.tokens[:, 0] for b in rollouts.batches(4, generator)]).tolist()

    generator = torch.Generator().manual_seed(3)
    first, second = order(generator), order(generator)
    assert first != second and sorted(first) == sorted(second)
    assert order(torch.Generator().manual_seed(3)) == first


def test_chosen_rows_keep_their_weights_and_batches_come_in_random_order():
    rollouts = random_rollouts([(2, 1 + i) for i in range(32)])
    rollouts = dataclasses.replace(rollouts, weights=torch.arange(32.0))
    chosen = rollouts.rows(torch.tensor([5, 2]))
    assert chosen.weights.tolist() == [5.0, 2.0] and chosen.response_mask.sum(1).tolist() == [6, 3]
    assert torch.equal(chosen.tokens, rollouts.tokens[[5, 2], :8])
    firsts = [int(b.weights.min()) for b in rollouts.batches(4, torch.Generator().manual_seed(1))]
    assert sorted(firsts) == list(range(0, 32, 4)) and firsts != sorted(firsts)


def test_malformed_rollouts_are_refused():
    with pytest.raises(ValueError, match="no rollouts"):
        DrafterBatch.collate([])
    with pytest.raises(ValueError, match="no prompt"):
        DrafterBatch.collate([([], [3, 4])])
    with pytest.raises(ValueError, match="no prompt"):
        DrafterBatch.collate([([5], [6]), ([], [3, 4])])
    with pytest.raises(ValueError, match="weights"):
        DrafterBatch(torch.zeros(2, 3).long(), torch.zeros(2, 3).bool(), torch.ones(3))
