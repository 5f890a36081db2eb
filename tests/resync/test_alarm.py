"""resync/alarm.py: a fall is reported once, with the likely cause."""

from __future__ import annotations

import pytest

from respec_trainer.resync.alarm import AcceptAlarm


def test_a_fall_beyond_the_share_is_reported_once():
    alarm = AcceptAlarm(share=0.3, verified=True)
    falls = ([1.0, 1.0], [1.0, 0.5], [1.0, 0.4], [0.6, 0.5], [0.6, 0.5], [1.0, 1.0])
    heard = [alarm.check(acceptance, "drafter-1") for acceptance in falls]
    assert [text is not None for text in heard] == [False, False, False, True, False, False]
    assert "from 2.40 to 1.90" in heard[3] and "30%" in heard[3]


def test_other_numbers_of_steps_are_no_fall():
    """Three drafts, then one, then none, then three again, from equally good drafters."""
    alarm = AcceptAlarm(share=0.3, verified=True)
    by_depth = [0.8, 0.8, 0.8]
    assert [alarm.check(by_depth[:depth], "drafter-1") for depth in (3, 1, 0, 3)] == [None] * 4
    assert "from 1.80 to 1.40" in alarm.check([0.4], "drafter-1")


def test_nothing_can_fall_where_nothing_is_accepted():
    alarm = AcceptAlarm(share=0.3, verified=True)
    assert [alarm.check(nothing, "none") for nothing in ([], [0.0], [0.0, 0.0])] == [None] * 3


@pytest.mark.parametrize(
    ("verified", "now", "cause"),
    [
        (False, "drafter-1", "resync.verify=checksum"),
        (True, "drafter-2", "drafter-2, which replaced drafter-1, drafts worse"),
        (True, "drafter-1", "still drafter-1, by its digests, so the policy moved away"),
    ],
)
def test_the_cause_is_named(verified, now, cause):
    alarm = AcceptAlarm(share=0.2, verified=verified)
    alarm.check([1.0, 1.0], "drafter-1")
    assert cause in alarm.check([0.5, 0.0], now)
