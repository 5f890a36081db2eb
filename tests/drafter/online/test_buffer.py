"""drafter/online/buffer.py: the budget is never exceeded, and the right rows are kept."""

from __future__ import annotations

import copy
from statistics import fmean

import pytest
import torch

from respec_trainer.drafter.online.buffer import MB, ReplayBuffer
from respec_trainer.errors import ConfigError
from tests.support.drafters import lognormal_lengths, row_bytes, sized_row, stored_row, stored_snapshot
from tests.support.processes.threads import together

WIDE = 1024  # hidden size: a row of ten tokens is 0.14 MB, a snapshot 0.76 MB
RETENTIONS = ["recency", "reservoir"]
SMALL = stored_snapshot(1)  # 1.8 kB


def rows_of(step: int, count: int = 4, hidden: int = WIDE) -> list:
    snapshot = stored_snapshot(hidden)
    return [stored_row(snapshot, step=step, hidden=hidden, seed=i) for i in range(count)]


def sized_rows(lengths, step: int = 0) -> list:
    return [sized_row(SMALL, length, step) for length in lengths]


def counted(buffer: ReplayBuffer) -> int:
    """The bytes that the buffer holds, counted from its rows."""
    snapshots = {id(row.snapshot): row.snapshot for row in buffer.rows}.values()
    return sum(t.nbytes for part in (*buffer.rows, *snapshots) for t in vars(part).values() if torch.is_tensor(t))


@pytest.mark.parametrize("retention", RETENTIONS)
def test_the_budget_holds_and_is_counted_right(retention):
    buffer = ReplayBuffer(6 * MB, retention, hold=1)
    for step in range(10):
        buffer.add(rows_of(step), batch=2)
        assert buffer.nbytes == counted(buffer) <= 6 * MB
    assert len(buffer) >= 14


def test_recency_keeps_the_newest_in_order():
    buffer = ReplayBuffer(6 * MB)
    for step in range(10):
        buffer.add(rows_of(step), batch=2)
    steps = [row.step for row in buffer.rows]
    assert steps == sorted(steps) and steps[-4:] == [9] * 4 and steps[-8:-4] == [8] * 4
    assert {row.step for row in buffer.choose(0.5)} <= set(steps[-(-len(steps) // 2) :])
    assert [row.step for row in buffer.newest(3)] == [9, 9, 9] and len(buffer.newest()) == 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("retention", RETENTIONS)
def test_of_a_step_larger_than_the_budget_a_fair_sample_is_kept_and_measured_on(retention, seed):
    """40 % of a step fit. Over 50 steps kept responses are as long as all, and so are the 16 that are measured on."""
    steps = lognormal_lengths(50, 128, seed)
    budget = int(0.4 * fmean(row_bytes(length) for step in steps for length in step)) * 128 + SMALL.nbytes
    buffer, kept, measured, asked = ReplayBuffer(budget, retention, seed, hold=64), [], [], []
    for number, lengths in enumerate(steps):
        buffer.add(sized_rows(lengths, number), batch=1)
        assert buffer.nbytes <= budget and {row.step for row in buffer.newest()} == {number}
        for found, limit in ((kept, None), (measured, 16)):
            found.append([row.response for row in buffer.newest(limit)])
        asked.append(fmean(lengths))
    assert all(len(lengths) == 16 for lengths in measured)
    share = sum(map(len, kept)) / (50 * 128)
    assert share > (0.3 if retention == "recency" else 0.15), "half of the budget at least, if the step is dropped"
    for found in (kept, measured):
        ratios = [fmean(lengths) / mean for lengths, mean in zip(found, asked, strict=True)]
        assert fmean(ratios) == pytest.approx(1, abs=0.05)
        assert fmean(length for lengths in found for length in lengths) == pytest.approx(fmean(asked), rel=0.05)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_a_row_is_kept_as_often_whatever_its_length(retention):
    """400 buffers of one step of eight rows, one of them much longer; five standard deviations of a binomial count."""
    lengths, kept, counts = [300, 20, 30, 40, 50, 60, 70, 80], torch.zeros(8), set()
    for seed in range(400):
        buffer = ReplayBuffer(SMALL.nbytes + row_bytes(480), retention, seed)
        buffer.add(sized_rows(lengths), batch=1)
        counts.add(len(buffer))
        kept[[lengths.index(row.response) for row in buffer.rows]] += 1
    (count,) = counts  # decided by the lengths, not by the draw
    assert 3 <= count <= 6
    assert (kept / 400 - count / 8).abs().max() < 5 * (count / 8 * (1 - count / 8) / 400) ** 0.5


def test_rows_of_an_older_step_are_dropped_fairly_while_newer_ones_come():
    """A step of 64 rows shrinks with every step of 16 that comes; what is left of it is as long as all of it was."""
    ratios = []
    for seed in range(20):
        first, *later = lognormal_lengths(9, 64, seed)
        buffer, left = ReplayBuffer(SMALL.nbytes * 9 + 110 * row_bytes(84), seed=seed), [first]
        buffer.add(sized_rows(first), batch=1)
        for number, lengths in enumerate(later, start=1):
            buffer.add(sized_rows(lengths[::4], number), batch=1)
            left.append([row.response for row in buffer.rows if row.step == 0])
            assert not left[-1] or len(buffer) - len(left[-1]) == 16 * number, "newer steps are whole"
            assert not set(left[-1]) - set(left[-2])
        ratios += [fmean(lengths) / fmean(first) for lengths in left if 0 < len(lengths) < 64]
    assert len(ratios) > 60 and fmean(ratios) == pytest.approx(1, abs=0.05)


def test_ranks_keep_the_same_share_though_their_rows_are_not_equally_long():
    """Rank 1 has rows three times as long. Ranks that filled their budgets alone would keep rank 0's more often."""
    budget = SMALL.nbytes + 32 * row_bytes(60)

    def fill(rank: int, least) -> list[tuple[list[int], list[float]]]:
        buffer, history = ReplayBuffer(budget, "recency", 0, rank, agree=least), []
        for number, lengths in enumerate(lognormal_lengths(30, 32, seed=rank)):
            buffer.add(sized_rows([(1 + 2 * rank) * length for length in lengths], number), batch=1)
            history.append(([row.response for row in buffer.newest()], [step.share for step in buffer.steps]))
        return history

    one, three = together(2, fill)
    assert [shares for _, shares in one] == [shares for _, shares in three]
    assert all(abs(len(a) - len(b)) <= 1 for (a, _), (b, _) in zip(one, three, strict=True))
    for rank, history in enumerate((one, three)):
        steps = zip(history, lognormal_lengths(30, 32, seed=rank), strict=True)
        ratios = [fmean(kept) / fmean(lengths) / (1 + 2 * rank) for (kept, _), lengths in steps]
        assert fmean(ratios) == pytest.approx(1, abs=0.07)


def test_ranks_draw_other_orders_of_the_same_steps():
    one, other = (ReplayBuffer(64 * MB, "reservoir", 5, rank) for rank in range(2))
    for step in range(3):
        for buffer in (one, other):
            buffer.add(sized_rows(range(10, 40), step), batch=1)
    assert [step.lot for step in one.steps] == [step.lot for step in other.steps]
    assert [row.response for row in one.newest()] != [row.response for row in other.newest()]
    assert [row.response for row in one.choose(1.0)] != [row.response for row in other.choose(1.0)]


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


def test_a_reservoir_holds_the_steps_of_the_highest_lots_and_no_smaller_one_in_their_place():
    """Beside the newest, held to be measured, steps are a run from the highest lot on, the last of them in part."""
    for seed in range(8):
        buffer, lots = ReplayBuffer(SMALL.nbytes * 4 + 100 * row_bytes(60), "reservoir", seed, hold=4), {}
        for number, lengths in enumerate(lognormal_lengths(25, 16, seed, sigma=1.5)):
            buffer.add(sized_rows(lengths[: 4 + number * 5 % 12], number), batch=1)
            lots[number] = next(step.lot for step in buffer.steps if step.number == number)
            older = {step.number: step.share for step in buffer.steps if step.number != number}
            ranked = sorted((n for n in lots if n != number), key=lots.get, reverse=True)
            assert set(older) == set(ranked[: len(older)])
            assert all(older[n] == 1.0 for n in ranked[: len(older) - 1])
        assert 1 < len(older) < 24


@pytest.mark.parametrize("retention", RETENTIONS)
def test_rows_to_be_measured_on_stay_until_the_next_step(retention):
    """Four of the newest, or as many as half of the budget holds; and only they, if the step's lot drops it."""
    for hold, most in ((4, 4), (12, 5)):
        counts = set()
        for seed in range(30):
            buffer = ReplayBuffer(SMALL.nbytes * 2 + 10 * row_bytes(60), retention, seed, hold=hold)
            for number in range(6):
                buffer.add(sized_rows([60] * 8, number), batch=1)
                assert [row.step for row in buffer.newest(3)] == [number] * 3 and buffer.nbytes <= buffer.budget
            counts.add(len(buffer.newest()))
        assert counts == ({8} if retention == "recency" else {most, 8}), "whole where its lot is the highest"


def test_a_step_without_rows_is_the_newest_and_nothing_is_measured_twice():
    buffer = ReplayBuffer(64 * MB)
    buffer.add(rows_of(0), batch=2)
    buffer.add([], batch=2)
    assert len(buffer) == 4 and buffer.newest() == [] and len(buffer.choose(1.0)) == 4


def test_a_step_without_rows_is_forgotten_with_those_of_its_time():
    buffer = ReplayBuffer(SMALL.nbytes * 3 + 20 * row_bytes(60))
    for number in range(12):
        buffer.add(sized_rows([60] * 8 if number % 2 else [], number), batch=1)
    assert [step.number for step in buffer.steps if step.rows] == [7, 9, 11] and len(buffer.steps) <= 5


def test_choosing_takes_its_share_once_each():
    buffer = ReplayBuffer(64 * MB)
    buffer.add(rows_of(0, count=7), batch=2)
    assert len(buffer.choose(1.0)) == len({id(row) for row in buffer.choose(1.0)}) == 7
    assert len(buffer.choose(1 / 3)) == 3
    assert ReplayBuffer(1 * MB).choose(1.0) == [] and ReplayBuffer(1 * MB).newest(4) == []


@pytest.mark.parametrize("retention", RETENTIONS)
def test_every_row_of_a_step_is_chosen_as_often(retention):
    buffer, counts = ReplayBuffer(64 * MB, retention), torch.zeros(10)
    buffer.add(sized_rows(range(10, 110, 10)), batch=1)
    for _ in range(600):
        for row in buffer.choose(0.2):
            counts[row.response // 10 - 1] += 1
    # Binomial counts of 600 draws of a fifth: five standard deviations are 49.
    assert counts.sum() == 1200 and (counts - 120).abs().max() < 49


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


def test_a_first_step_smaller_than_a_batch_is_not_refused():
    buffer = ReplayBuffer(2 * MB)
    buffer.add(rows_of(0, count=3), batch=8)
    assert len(buffer) == 3


def test_what_a_refusal_asks_for_is_enough_for_any_draw():
    lengths = [9000, 100, 100, 200, 6000, 100]
    with pytest.raises(ConfigError, match="set it 1 or more higher"):
        ReplayBuffer(SMALL.nbytes + row_bytes(9000), seed=0).add(sized_rows(lengths), batch=3)
    for seed in range(20):
        buffer = ReplayBuffer(SMALL.nbytes + row_bytes(9000) + MB, seed=seed)
        buffer.add(sized_rows(lengths), batch=3)
        assert len(buffer) >= 3


def test_later_rows_that_are_too_large_are_dropped_not_refused():
    buffer = ReplayBuffer(4 * MB)
    assert buffer.add(rows_of(0), batch=4) == 0
    assert buffer.add(rows_of(1, hidden=16 * WIDE), batch=4) == 4
    assert [row.step for row in buffer.rows] == [0] * 4 and buffer.nbytes == counted(buffer) <= 4 * MB


@pytest.mark.parametrize("retention", RETENTIONS)
def test_its_state_goes_on_in_another(retention):
    """Also where it is full, and the newest step is only held to be measured on."""
    steps = lognormal_lengths(12, 16, seed=0)
    budget = SMALL.nbytes * 3 + 40 * row_bytes(60)
    for done in range(1, 9):
        buffer, other = (ReplayBuffer(budget, retention, seed, hold=4) for seed in (3, 4))
        for number in range(done):
            buffer.add(sized_rows(steps[number], number), batch=2)
            buffer.choose(0.5)
        other.load_state_dict(copy.deepcopy(buffer.state_dict()))
        assert other.nbytes == counted(other) == buffer.nbytes
        for number in range(done, 12):
            for one in (buffer, other):
                one.add(sized_rows(steps[number], number), batch=2)
            kept = [[(row.step, row.response) for row in one.rows] for one in (buffer, other)]
            assert kept[0] == kept[1]
        assert [r.response for r in buffer.choose(1.0)] == [r.response for r in other.choose(1.0)]
        assert all(row.snapshot is step.snapshot for step in other.steps for row in step.rows)


def test_a_restored_reservoir_admits_no_step_below_one_that_it_dropped():
    """Steps of one row: where a long one of a high lot was dropped, a short one of a lower lot would fit after it."""
    for seed in range(20):
        buffer, other = (ReplayBuffer(SMALL.nbytes * 9 + row_bytes(900), "reservoir", n) for n in (seed, 99))
        lengths = torch.randint(5, 400, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        for number, length in enumerate(lengths):
            if number == 20:
                other.load_state_dict(copy.deepcopy(buffer.state_dict()))
            for one in (buffer, other) if number >= 20 else (buffer,):
                one.add(sized_rows([length], number), batch=1)
            assert number < 20 or [step.number for step in buffer.steps] == [step.number for step in other.steps]


def test_a_state_is_loaded_into_a_smaller_budget():
    buffer, small = ReplayBuffer(6 * MB), ReplayBuffer(2 * MB)
    for step in range(3):
        buffer.add(rows_of(step), batch=2)
    small.load_state_dict(buffer.state_dict())
    assert {row.step for row in small.rows} == {2} and small.nbytes == counted(small) <= 2 * MB


def test_a_buffer_that_was_used_before_it_was_saved_refuses_no_step():
    buffer, other = ReplayBuffer(4 * MB), ReplayBuffer(4 * MB)
    buffer.add(rows_of(0), batch=4)
    other.load_state_dict(buffer.state_dict())
    assert other.add(rows_of(1, hidden=16 * WIDE), batch=4) == 4
    fresh = ReplayBuffer(4 * MB)
    fresh.load_state_dict(ReplayBuffer(4 * MB).state_dict())
    with pytest.raises(ConfigError, match="hold 0 of the 4 responses"):
        fresh.add(rows_of(1, hidden=16 * WIDE), batch=4)


def test_a_state_of_an_earlier_version_is_refused():
    with pytest.raises(ConfigError, match="saved by another version .* checkpoint.resume=never"):
        ReplayBuffer(MB).load_state_dict({"rows": [], "snapshots": [], "lots": [], "generator": None})
