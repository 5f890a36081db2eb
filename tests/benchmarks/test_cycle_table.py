"""benchmarks/cycle_table.py: medians of made-up logs, and regret by them, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cycle_table import CycleTable, cycles, references, regrets, spent
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.speculation.shape import OFF, chain
from respec_trainer.speculation.simulation.trace import Trace


def log_of(rows: list[dict]) -> DecodeLog:
    """A log of rows with `seconds` until the next one; what a row does not name is that of a plain batch of one."""
    usual = {"prefill": False, "batch": 1, "context": 100.0, "steps": 0, "seconds": 1.0, "catch_up": 0.0, "switch": 0.0}
    rows = [usual | row for row in rows]
    log = DecodeLog(start=np.cumsum([0.0, *(row["seconds"] for row in rows)])[:-1])
    for name in ("prefill", "batch", "context", "steps", "catch_up", "switch"):
        setattr(log, name, np.array([row[name] for row in rows]))
    log.tokens = log.batch * (1 + log.steps)  # all drafts are kept
    return log


def steady(steps: int, seconds: dict[int, float], count: int = 5, **more) -> DecodeLog:
    """A rollout with one number of steps: `count` cycles of these seconds at each batch size, and one batch more."""
    rows = [{"batch": batch, "steps": steps, "seconds": taken} | more for batch, taken in seconds.items()]
    return log_of([row for row in rows for _ in range(count)] + [{"batch": 1, "steps": steps}])


def test_a_cycle_ends_where_the_next_batch_starts():
    rows = [
        {"prefill": True, "seconds": 9.0},
        {"seconds": 2.0, "catch_up": 0.5, "switch": 0.25},
        {"seconds": 3.0},  # before prompts
        {"prefill": True, "seconds": 9.0},
        {"seconds": 4.0},
        {"seconds": 5.0},  # the last
    ]
    assert cycles(log_of(rows)) == pytest.approx([np.nan, 1.25, np.nan, np.nan, 4.0, np.nan], nan_ok=True)


def test_medians_by_place():
    """Contexts count with all that share an index of the tables, and so do batches; other batches are not mixed in."""
    logs = [log_of([{"seconds": each, "context": 96.0 + i} for i, each in enumerate((1.0, 7.0, 2.0, 0.0))])]
    drafting = [log_of([{"steps": 2, "seconds": 5.0, "context": 97.0}] * 2 + [{"steps": 2, "batch": 8}] * 3)]
    table = CycleTable({0: logs, 2: drafting})
    assert list(table.seconds.values()) == [[2.0, 5.0]], "a batch of 8 was measured with drafts only"
    shared = CycleTable({0: [steady(0, {40: 3.0})], 2: [steady(2, {42: 5.0})]})
    assert [3.0, 5.0] in shared.seconds.values() and len(shared.seconds) == 1
    assert table.at(1, 100) == [2.0, 5.0] == table.at(300, 9000), "the nearest place"
    assert table.cycle_seconds(OFF, 1, 100) == 2.0 and table.cycle_seconds(chain(2), 1, 100) == 5.0
    with pytest.raises(ValueError, match=r"measured with each of \[0, 3\] steps"):
        CycleTable({0: logs, 3: drafting})


def test_places_are_near_by_ratio():
    table = CycleTable({steps: [steady(steps, {4: 1.0, 32: 2.0})] for steps in (0, 1)})
    assert [table.at(batch, 100)[0] for batch in (2, 4, 10, 14, 64)] == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert table.nearest(2, 100)[1] == pytest.approx(np.log(2)) and table.nearest(4, 111)[1] == 0.0
    assert table.nearest(4, 400)[1] == pytest.approx(np.log(415.5 / 103.5))
    rows = [{"batch": 4}, {"batch": 5}, {"batch": 12}, {"batch": 4, "context": 400.0}, {"batch": 33}]
    assert table.covered(log_of([*rows, {"batch": 12, "prefill": True}])) == 3 / 5


TRACE = Trace(np.array([100, 100]), np.array([41, 81]), np.arange(2), np.array([[1.0], [1.0]]))


def test_what_a_rollout_s_choices_take():
    """Its own clock and its own number of passes do not count, but for what changing took."""
    table = CycleTable({0: [steady(0, {1: 1.0, 2: 2.0})], 1: [steady(1, {1: 5.0, 2: 3.0})]})
    rows = [
        {"prefill": True, "batch": 2, "seconds": 50.0, "catch_up": 9.0},
        *[{"batch": 2, "steps": 0, "seconds": 80.0}] * 20,  # 40 tokens, then 20 cycles of four: here 10 are left
        {"batch": 2, "steps": 1, "seconds": 70.0, "catch_up": 0.25, "switch": 0.5},
        *[{"batch": 2, "steps": 1, "seconds": 70.0}] * 9,
        *[{"batch": 1, "steps": 0, "seconds": 80.0}] * 3,
    ]
    assert spent(table, TRACE, log_of(rows)) == pytest.approx(20 * 2.0 + 10 * 3.0 + 40 * 1.0 + 0.25 + 0.5)


def test_references_take_what_the_table_says():
    """All drafts are kept. 40 steps of two and 40 of one by plain decoding; half as many cycles with one draft."""
    table = CycleTable({0: [steady(0, {1: 1.0, 2: 2.0})], 1: [steady(1, {1: 5.0, 2: 3.0})]})
    found = references(table, TRACE)
    assert found == pytest.approx(
        {"s=0": 40 * 2 + 40 * 1, "s=1": 20 * 3 + 20 * 5, "greedy": 100, "weighted": 100, "critical": 100}
    ), "drafting pays with two alone: 20 cycles of 3 s, then 40 steps of 1 s"


def rollout(choices: list[tuple[int, int, int]]) -> DecodeLog:
    """A rollout of (batch, steps, count) whose own clock stands for nothing."""
    return log_of([{"batch": b, "steps": s, "seconds": 1e6} for b, s, count in choices for _ in range(count)])


def test_each_half_is_judged_by_the_other_ones_times():
    """Everything takes twice as long in even rounds as in odd ones: the even ones are judged by the shorter times."""
    fixed = {steps: [] for steps in (0, 1)}
    for number in range(4):
        slow = 2.0 if number % 2 == 0 else 1.0
        fixed[0].append(steady(0, {1: 1.0 * slow, 2: 2.0 * slow}))
        fixed[1].append(steady(1, {1: 5.0 * slow, 2: 3.0 * slow}))
    best = rollout([(2, 1, 20), (1, 0, 40)])  # 100 s by the odd rounds' times
    paid = log_of([{"batch": 1, "catch_up": 10.0}])  # and 10 s that do not scale
    paid.steps, paid.batch, paid.tokens = best.steps, best.batch, best.tokens
    paid.start, paid.prefill, paid.context = best.start, best.prefill, best.context
    paid.catch_up, paid.switch = np.append(10.0, np.zeros(59)), np.zeros(60)
    never = rollout([(2, 0, 40), (1, 0, 40)])
    found = regrets(fixed, {"a": [never, never, paid, paid], "b": [never, paid]}, TRACE)
    assert [value for value, _ in found["a"]] == pytest.approx([0.2, 0.2, 10 / 100, 10 / 200])
    assert [value for value, _ in found["b"]] == pytest.approx([0.2, 10 / 200])
    assert [share for _, share in found["a"]] == [1.0] * 4


def test_times_of_one_half_are_not_those_of_the_other():
    """Drafting with one sequence is quick in even rounds alone. By these it is right in odd rounds, and only there."""
    fixed = {0: [steady(0, {1: 1.0, 2: 2.0})] * 2, 1: [steady(1, {1: t, 2: 3.0}) for t in (1.0, 5.0)]}
    drafting = rollout([(2, 1, 20), (1, 1, 20)])
    first, second = (value for value, _ in regrets(fixed, {"a": [drafting, drafting]}, TRACE)["a"])
    assert first == pytest.approx(160 / 100 - 1) and second == pytest.approx(0.0)
    with pytest.raises(ValueError, match="two rounds"):
        regrets(fixed, {"a": [drafting]}, TRACE)
