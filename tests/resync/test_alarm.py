"""resync/alarm.py: a fall is reported once, with the likely cause."""

from __future__ import annotations

import json

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


def test_a_step_without_drafts_does_not_hide_a_fall():
    alarm = AcceptAlarm(share=0.3, verified=True)
    assert [alarm.check(acceptance, "drafter-1") for acceptance in ([0.8, 0.5], [], [])] == [None] * 3
    assert "from 2.20 to 1.40" in alarm.check([0.4, 0.0], "drafter-1")


def test_a_resumed_run_remembers_the_step_before():
    alarm, again, new = (AcceptAlarm(share=0.3, verified=True) for _ in range(3))
    alarm.check([0.8, 0.5], "drafter-1")
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert "drafter-2, which replaced drafter-1" in again.check([0.4], "drafter-2")
    again.load_state_dict(json.loads(json.dumps(new.state_dict())))
    assert again.check([0.1], "drafter-1") is None, "a run that had no step yet has nothing to compare"


def test_depths_are_reached_only_through_those_before():
    """0.5 + 0.5 * 0.5 + 0.5 * 0.5 * 0.5 = 0.875 drafts, then 0.5 + 0.5 * 0.2 + 0 = 0.6."""
    alarm = AcceptAlarm(share=0.3, verified=True)
    alarm.check([0.5, 0.5, 0.5], "drafter-1")
    assert "from 1.88 to 1.60" in alarm.check([0.5, 0.2, 0.0], "drafter-1")


def test_a_fall_by_just_the_share_is_none():
    alarm = AcceptAlarm(share=0.5, verified=True)
    alarm.check([0.5], "drafter-1")
    assert alarm.check([0.25], "drafter-1") is None
    assert alarm.check([0.1249], "drafter-1") is not None


def test_more_draft_steps_do_not_hide_a_fall():
    alarm = AcceptAlarm(share=0.3, verified=True)
    alarm.check([0.8], "drafter-1")
    assert "from 1.80 to 1.50" in alarm.check([0.5, 0.9, 0.9], "drafter-1")


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
