"""drafter/online/stored.py: bytes of rows and steps, and shares that only shrink."""

from __future__ import annotations

import copy

import pytest
import torch

from respec_trainer.drafter.online.stored import StoredStep
from tests.support.drafters import row_bytes, sized_row, stored_row, stored_snapshot

SNAPSHOT = stored_snapshot(1)
LENGTHS = [30, 5, 80, 11, 60, 42, 7, 25, 90, 14]


def stored(lengths=LENGTHS, seed: int = 0) -> StoredStep:
    rows = [sized_row(SNAPSHOT, length) for length in lengths]
    return StoredStep.of(rows, number=3, lot=0.7, generator=torch.Generator().manual_seed(seed))


def test_bytes_by_hand():
    row = sized_row(SNAPSHOT, 9, hidden=2)
    assert (row.response, row.prompt) == (9, 4)
    # 13 ids of 8 bytes, 13 x 6 features, 9 x 2 hidden states and 9 log-sum-exps of 4.
    assert row.nbytes == row_bytes(9) == 13 * 8 + 13 * 6 * 4 + 9 * 2 * 4 + 9 * 4
    # 131 ids of 8 bytes, 131 embeddings and 64 output rows of 4.
    assert SNAPSHOT.nbytes == 131 * 8 + 131 * 4 + 64 * 4
    assert stored().nbytes == sum(map(row_bytes, LENGTHS)) + SNAPSHOT.nbytes


def test_a_step_shrinks_and_never_grows():
    step = stored()
    order = [row.response for row in step.rows]
    assert sorted(order) == sorted(LENGTHS)
    for share, left, count in (
        (1.0, 1.0, 10),
        (0.6, 0.6, 6),
        (0.9, 0.6, 6),
        (0.3, 0.3, 3),
        (0.0, 0.0, 0),
        (0.5, 0.0, 0),
    ):
        step.cut(share)
        assert step.share == left and [row.response for row in step.rows] == order[:count]
    assert step.nbytes == 0, "the snapshot goes with the last row"


@pytest.mark.parametrize("seed", range(5))
def test_what_fits_is_the_same_for_every_draw_and_takes_no_more(seed):
    for room in (0, SNAPSHOT.nbytes, SNAPSHOT.nbytes + row_bytes(89), SNAPSHOT.nbytes + row_bytes(90), 9000, 10**6):
        share = stored(seed=99).fits(room)
        step = stored(seed=seed)
        assert step.fits(room) == share and step.most_bytes(share) <= max(room, 0)
        step.cut(share)
        assert step.nbytes <= step.most_bytes(share)
    assert stored().fits(SNAPSHOT.nbytes + row_bytes(89)) == 0.0 < stored().fits(SNAPSHOT.nbytes + row_bytes(90)) == 0.1
    assert stored().most_bytes(1.0) == stored().nbytes and stored().most_bytes(0.0) == 0


def test_the_share_that_a_number_of_rows_is():
    assert stored().share_of(4) == 0.4 and stored().share_of(10) == stored().share_of(64) == 1.0
    assert stored().share_of(0) == 0.0 == stored([]).share_of(0) and stored([]).share_of(3) == 1.0


def test_a_step_without_rows():
    step = stored([])
    assert step.nbytes == step.most_bytes(1.0) == 0 and step.fits(0) == 1.0 and step.snapshot is None
    step.cut(0.5)
    assert StoredStep.of_state(step.state_dict()).rows == []


def test_its_state_is_the_whole_of_it():
    rows = [stored_row(stored_snapshot(8), hidden=8, response=5 + n, seed=n) for n in range(6)]
    step = StoredStep.of(rows, 2, 0.4, torch.Generator().manual_seed(1))
    step.cut(0.5)
    other = StoredStep.of_state(copy.deepcopy(step.state_dict()))
    assert (other.number, other.lot, other.share, other.nbytes) == (2, 0.4, 0.5, step.nbytes)
    assert [row.response for row in other.rows] == [row.response for row in step.rows] and len(other.rows) == 3
    for one, two in zip(step.rows, other.rows, strict=True):
        assert torch.equal(one.features, two.features) and torch.equal(one.tokens, two.tokens)
        assert (one.weight, one.step, one.passes) == (two.weight, two.step, two.passes)
        assert two.snapshot is other.snapshot and torch.equal(two.snapshot.embeddings, one.snapshot.embeddings)
    for target in (step, other):
        target.cut(0.2)
    assert [row.response for row in other.rows] == [row.response for row in step.rows]
