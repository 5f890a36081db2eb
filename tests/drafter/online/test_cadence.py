"""drafter/online/cadence.py: training at an interval, or when it saves time."""

from __future__ import annotations

import pytest

from respec_trainer.drafter.online.cadence import Cadence


def test_every_interval():
    cadence, trained = Cadence("interval", interval=3), []
    assert not cadence.due(), "nothing has been observed"
    for step in range(9):
        cadence.note(3.0, 10.0)
        if cadence.due():
            trained.append(step)
            cadence.trained(5.0)
    assert trained == [2, 5, 8] and cadence.share == pytest.approx(1 / 3)


def test_need_waits_for_a_fall_that_pays():
    cadence = Cadence("need", delta=0.2)
    for accept_length, due in ((3.0, False), (2.9, False), (2.7, True)):
        cadence.note(accept_length, 10.0)
        assert cadence.due() == due
    assert cadence.saving() == pytest.approx((1 - 2.7 / 3.0) * 10.0 * 3)
    cadence.trained(8.0)
    assert not cadence.due() and cadence.share == 1.0
    cadence.note(3.0, 10.0)
    cadence.note(2.7, 10.0)  # fallen far enough, but 2 x 1 seconds are less than the 8 that training took
    assert not cadence.due()
    for _ in range(6):
        cadence.note(2.7, 10.0)
    assert not cadence.due()
    cadence.note(2.7, 10.0)  # 9 x 1 seconds
    assert cadence.due()


def test_a_fall_is_from_the_best_since_the_last_training():
    cadence = Cadence("need", delta=0.2)
    cadence.note(3.5, 10.0)
    cadence.trained(0.0)
    cadence.note(3.0, 10.0)
    cadence.note(2.9, 10.0)
    assert not cadence.due()


def test_its_state_goes_on_in_another():
    cadence, other = Cadence("need"), Cadence("need")
    cadence.note(3.0, 10.0)
    cadence.trained(2.0)
    cadence.note(2.5, 9.0)
    other.load_state_dict(cadence.state_dict())
    assert other == cadence


def test_a_fall_of_just_delta_is_enough_and_a_saving_of_just_the_cost_is_not():
    cadence = Cadence("need", interval=3, delta=0.25)
    assert cadence.share == 1.0 and not cadence.due() and cadence.saving() == 0.0
    cadence.note(3.0, 10.0)
    cadence.note(2.75, 10.0)
    assert cadence.due()
    cadence.trained(10.0)
    cadence.note(4.0, 10.0)
    cadence.note(2.0, 10.0)
    assert cadence.saving() == 10.0 and not cadence.due()  # (1 - 2 / 4) of 10 seconds, twice: what training took
    cadence.note(2.0, 10.0)
    assert cadence.due()
