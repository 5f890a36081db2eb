"""resync/alarm.py: a fall is told once, with the cause that the facts leave."""

from __future__ import annotations

import pytest

from respec_trainer.resync.alarm import AcceptAlarm


def test_a_fall_beyond_the_share_is_told_once():
    alarm = AcceptAlarm(share=0.3, verified=True)
    heard = [alarm.hear(length, "drafter-1") for length in (3.0, 2.5, 2.4, 1.9, 1.9, 3.0)]
    assert [text is not None for text in heard] == [False, False, False, True, False, False]
    assert "from 2.40 to 1.90" in heard[3] and "30%" in heard[3]


def test_nothing_can_fall_where_nothing_is_accepted():
    alarm = AcceptAlarm(share=0.3, verified=True)
    assert [alarm.hear(1.0, "none") for _ in range(3)] == [None] * 3


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
    alarm.hear(3.0, "drafter-1")
    assert cause in alarm.hear(1.5, now)
