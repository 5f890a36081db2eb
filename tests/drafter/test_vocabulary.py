"""drafter/vocabulary.py: the maps between draft and target ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.drafter.vocabulary import coverage, d2t, draft_vocabulary, ids_from_d2t, t2d
from respec_trainer.errors import ConfigError


@st.composite
def counted(draw):
    counts = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=64, max_size=300)))
    return counts, 64 * draw(st.integers(1, len(counts) // 64))


@settings(max_examples=100, deadline=None)
@given(counted())
def test_the_most_frequent_in_ascending_order(case):
    counts, size = case
    ids = draft_vocabulary(counts, size)
    assert len(ids) == size and bool((ids.diff() > 0).all())
    left_out = torch.ones(len(counts), dtype=torch.bool)
    left_out[ids] = False
    if bool(left_out.any()):
        assert counts[left_out].max() <= counts[ids].min()


@settings(max_examples=100, deadline=None)
@given(counted())
def test_maps_are_inverse_to_each_other(case):
    counts, size = case
    ids = draft_vocabulary(counts, size)
    difference, held = d2t(ids), t2d(ids, len(counts))
    for draft_id, target_id in enumerate(ids.tolist()):
        assert draft_id + difference[draft_id] == target_id
    assert torch.equal(held.nonzero().flatten(), difference + torch.arange(size))
    assert torch.equal(ids_from_d2t(difference), ids)
    assert difference.dtype == torch.int64 and held.dtype == torch.bool


@settings(max_examples=50, deadline=None)
@given(counted())
def test_coverage_is_a_share_that_grows_with_the_vocabulary(case):
    counts, size = case
    share = coverage(counts, draft_vocabulary(counts, size))
    assert 0 <= coverage(counts, draft_vocabulary(counts, 64)) <= share <= 1
    if int(counts.sum()):
        assert share >= size / len(counts) - 1e-12  # the most frequent cover at least their share


def test_of_equally_frequent_tokens_the_lowest():
    counts = torch.zeros(128, dtype=torch.int64)
    counts[100] = 3
    assert draft_vocabulary(counts, 64).tolist() == [*range(63), 100]


def test_coverage_by_hand():
    counts = torch.tensor([6, 1, 3])
    assert coverage(counts, torch.tensor([0, 2])) == pytest.approx(0.9)
    assert coverage(torch.zeros(3), torch.tensor([1])) == 1.0


@pytest.mark.parametrize("size", [0, 1, 65, -64, 192])
def test_sizes_that_cannot_be_served_are_refused(size):
    with pytest.raises(ConfigError, match=f"{size} tokens .* at most 128"):
        draft_vocabulary(torch.ones(150), size)
