"""drafter/online/buffer.py: the budget is never exceeded, and the right rows are kept."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.drafter.online.buffer import MB, ReplayBuffer
from respec_trainer.errors import ConfigError
from tests.support.drafters import stored_row, stored_snapshot

WIDE = 1024  # hidden size: a row of ten tokens is 0.14 MB, a snapshot 0.76 MB


def rows_of(step: int, count: int = 4, hidden: int = WIDE) -> list:
    snapshot = stored_snapshot(hidden)
    return [stored_row(snapshot, step=step, hidden=hidden, seed=i) for i in range(count)]


def counted(buffer: ReplayBuffer) -> int:
    """The bytes that the buffer holds, counted from its rows."""
    snapshots = {id(row.snapshot): row.snapshot for row in buffer.rows}.values()
    return sum(t.nbytes for part in (*buffer.rows, *snapshots) for t in vars(part).values() if torch.is_tensor(t))


@pytest.mark.parametrize("retention", ["recency", "reservoir"])
def test_the_budget_holds_and_is_counted_right(retention):
    buffer = ReplayBuffer(6 * MB, retention)
    for step in range(10):
        buffer.add(rows_of(step), batch=2)
        assert buffer.nbytes == counted(buffer) <= 6 * MB
    assert len(buffer) >= 16


def test_recency_keeps_the_newest_in_order():
    buffer = ReplayBuffer(6 * MB)
    for step in range(10):
        buffer.add(rows_of(step), batch=2)
    steps = [row.step for row in buffer.rows]
    assert steps == sorted(steps) and steps[-4:] == [9] * 4
    assert {row.step for row in buffer.choose(0.5)} <= set(steps[-(-len(steps) // 2) :])
    assert [row.step for row in buffer.newest(3)] == [9, 9, 9]


def test_a_reservoir_is_a_fair_sample_of_all_steps():
    kept = torch.zeros(20)
    for seed in range(100):
        buffer = ReplayBuffer(1 * MB, "reservoir", seed)
        snapshot = stored_snapshot(8)
        for step in range(20):
            buffer.add([stored_row(snapshot, step=step, hidden=2048, seed=0)], batch=1)
        for row in buffer.rows:
            kept[row.step] += 1
    expected = kept.sum() / 20
    assert expected > 10
    # Binomial counts: five standard deviations, over twenty steps.
    assert (kept - expected).abs().max() < 5 * expected.sqrt()


def test_choosing_takes_its_share_once_each():
    buffer = ReplayBuffer(64 * MB)
    buffer.add(rows_of(0, count=7), batch=2)
    assert len(buffer.choose(1.0)) == len({id(row) for row in buffer.choose(1.0)}) == 7
    assert len(buffer.choose(1 / 3)) == 3
    assert ReplayBuffer(1 * MB).choose(1.0) == [] and ReplayBuffer(1 * MB).newest(4) == []


def test_the_newest_are_learned_from_first():
    """Under "recency"; under "reservoir" the order is random."""
    recent, fair = ReplayBuffer(64 * MB), ReplayBuffer(64 * MB, "reservoir", seed=1)
    for step in range(3):
        for buffer in (recent, fair):
            buffer.add(rows_of(step), batch=2)
    assert [row.step for row in recent.choose(1.0)] == [2] * 4 + [1] * 4 + [0] * 4
    assert len({tuple(map(id, recent.choose(1.0))) for _ in range(3)}) == 3, "shuffled within a step"
    assert sorted(row.step for row in fair.choose(1.0)) == [0] * 4 + [1] * 4 + [2] * 4
    assert [row.step for row in fair.choose(1.0)] != [2] * 4 + [1] * 4 + [0] * 4


def test_a_budget_below_one_batch_is_refused_with_what_is_needed():
    rows = rows_of(0)
    message = r"1.0 MB that drafter.memory_mb leaves .* hold 1 of the 4 responses .* set it 1 or more higher"
    with pytest.raises(ConfigError, match=message):
        ReplayBuffer(1 * MB).add(rows, batch=4)
    ReplayBuffer(2 * MB).add(rows, batch=4)


def test_later_rows_that_are_too_large_are_dropped_not_refused():
    buffer = ReplayBuffer(4 * MB)
    buffer.add(rows_of(0), batch=4)
    buffer.add(rows_of(1, hidden=16 * WIDE), batch=4)
    assert [row.step for row in buffer.rows] == [0] * 4 and buffer.nbytes == counted(buffer) <= 4 * MB


@pytest.mark.parametrize("retention", ["recency", "reservoir"])
def test_its_state_goes_on_in_another(retention):
    buffer, other = ReplayBuffer(6 * MB, retention, seed=3), ReplayBuffer(6 * MB, retention, seed=4)
    for step in range(3):
        buffer.add(rows_of(step), batch=2)
    other.load_state_dict(buffer.state_dict())
    assert other.nbytes == counted(other) == buffer.nbytes
    for one in (buffer, other):
        one.add(rows_of(3), batch=2)
    assert [row.step for row in buffer.choose(1.0)] == [row.step for row in other.choose(1.0)]
