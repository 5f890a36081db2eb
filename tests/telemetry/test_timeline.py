"""telemetry/timeline.py: times, shares and acceptance of a phase, against values computed by hand, and its file."""

from __future__ import annotations

import numpy as np
import pytest

from respec_trainer.errors import DataError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.telemetry.timeline import (
    Timeline,
    acceptance_by_depth,
    load_timelines,
    pool,
    ratio_by_time,
    save_timelines,
    spans,
    steps_used,
    switches,
)
from tests.support.telemetry import hand_log, hand_timeline


def test_a_batch_lasts_until_the_next_one_and_the_last_as_long_as_its_parts():
    assert hand_timeline().seconds == pytest.approx([1.0, 1.0, 3.0, 0.5, 0.5, 0.5])
    assert pool([hand_timeline(), hand_timeline()], lambda line: line.seconds).sum() == pytest.approx(10.0)


def test_all_parts_of_the_last_batch_count():
    """Each is a power of two, so that a missing or a doubled one shows."""
    names = ("draft", "verify", "extend", "catch_up", "switch", "decide")
    parts = {name: np.array([0.0] * 5 + [2.0**power]) for power, name in enumerate(names)}
    assert hand_timeline(**parts).seconds[-1] == 2**6 - 1


def test_tokens_are_worth_the_plain_steps_that_draw_as_many():
    earned = hand_timeline().earned[[1, 2, 4, 5]]
    assert earned == pytest.approx([0.5 * 10 / 4, 0.5 * 4 / 4, 0.4 * 3 / 2, 0.4 * 4 / 2])
    assert np.isnan(Timeline.of(hand_log(), None).earned).all()


def test_acceptance_counts_the_batches_that_drafted_so_deep():
    # Depth 1: 4 + 2 + 2 sequences, of which 4 + 1 + 2 kept it. Depth 2: 4 sequences got there, 2 kept it.
    assert acceptance_by_depth([hand_timeline()]) == [7 / 8, 2 / 4]
    shallow = hand_timeline(steps=np.array([0, 1, 0, 0, 1, 1]), survivors=np.array([[0], [4], [0], [0], [1], [2]]))
    assert acceptance_by_depth([hand_timeline(), shallow]) == [14 / 16, 2 / 4], "logs of other widths"
    assert acceptance_by_depth([]) == acceptance_by_depth([Timeline.of(DecodeLog(), None)]) == []


def test_a_depth_that_no_draft_reached_has_no_acceptance():
    nothing_kept = hand_timeline(survivors=np.zeros((6, 2), int))
    assert acceptance_by_depth([nothing_kept]) == [0.0]


def test_switches_are_counted_within_an_engine_over_its_decode_batches():
    assert steps_used([hand_timeline()]) == {0, 1, 2}
    assert switches([hand_timeline()]) == 2
    assert switches([hand_timeline(), hand_timeline()]) == 4, "not from one engine to the next"


def test_timelines_come_back_from_their_file(tmp_path):
    lines = [hand_timeline(), Timeline.of(DecodeLog(failures=2), None), Timeline.of(hand_log(), None)]
    save_timelines(lines, tmp_path / "step_1.npz")
    found = load_timelines(tmp_path / "step_1.npz")
    assert [line.log.failures for line in found] == [0, 2, 0] and [len(line.log) for line in found] == [6, 0, 6]
    for line, other in zip(lines, found, strict=True):
        np.testing.assert_equal(other.plain, line.plain)
        np.testing.assert_equal(other.log.to_arrays(), line.log.to_arrays())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no file of arrays"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "step_1.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="step_1.npz is not a file of decode batches"):
        load_timelines(path)


def test_a_file_without_a_column_is_named(tmp_path):
    np.savez(tmp_path / "step_1.npz", **{"0.start": np.zeros(2)})
    with pytest.raises(DataError, match="prefill"):
        load_timelines(tmp_path / "step_1.npz")


def test_a_batch_counts_where_its_time_lies():
    line = hand_timeline()  # 6.5 s: prompts to 1, decoding to 5, a prompt to 5.5, decoding to the end
    assert line.times.tolist() == [0.0, 1.0, 2.0, 5.0, 5.5, 6.0, 6.5]
    achieved = ratio_by_time(line, line.decodes, line.earned, line.seconds, 2)
    within = 1.25 / 3  # of the second batch's 3 s, before the middle
    assert achieved == pytest.approx([(1.25 + within * 0.5) / 2.25, ((1 - within) * 0.5 + 0.6 + 0.8) / 2.75])
    kept = ratio_by_time(line, line.log.steps > 1, line.log.tokens, line.log.batch, 13)
    assert kept[2:4] == pytest.approx([2.5, 2.5]) and np.isnan(np.delete(kept, [2, 3])).all()
    nothing = ratio_by_time(line, line.log.steps > 9, line.log.tokens, line.log.batch, 3)
    assert np.isnan(nothing).all()


def test_spans_are_unbroken_runs():
    flags = np.array([True, True, False, True, False, True])
    assert spans(flags, np.arange(7) / 2) == [(0.0, 1.0), (1.5, 2.0), (2.5, 3.0)]
    assert spans(np.zeros(3, bool), np.arange(4)) == []
