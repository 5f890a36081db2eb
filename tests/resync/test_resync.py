"""resync/resync.py: a rank that is late for a push has another error than one that is gone."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from respec_trainer.resync.resync import Resync, ResyncError
from respec_trainer.watchdog.ending import lost_contact


@pytest.mark.parametrize(
    ("seconds", "lost", "words"),
    [(0.0, True, "contact was lost before actor-2"), (0.2, False, "not every rank came to push actor-2")],
)
def test_who_is_gone_is_not_called_late(monkeypatch, seconds, lost, words):
    """gloo has one error for both, a timeout; the watchdog reports which rank is gone."""

    def barrier(*_args, **_kwargs):
        time.sleep(seconds)
        raise RuntimeError("Ranks 1 failed to pass monitoredBarrier in 100 ms")

    monkeypatch.setattr(dist, "monitored_barrier", barrier)
    resync = Resync.__new__(Resync)
    resync.settings, resync.control = SimpleNamespace(timeout=0.1), None
    resync.actor = SimpleNamespace(version="actor-2")
    resync.held, resync.drafter = {}, None
    with pytest.raises(ResyncError, match=words) as caught:
        resync.push()
    assert lost_contact(caught.value) == lost
