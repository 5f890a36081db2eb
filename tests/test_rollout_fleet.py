"""rollout/fleet.py: whether an engine is still at work, asked from outside."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.fleet import FleetPending
from respec_trainer.rollout.sample import Request, SamplingParams

REQUESTS = [Request(str(i), (i, i), SamplingParams(max_new_tokens=4)) for i in range(3)]


def pending_on(engine) -> FleetPending:
    return FleetPending(SimpleNamespace(engine=engine, resume=False), REQUESTS)


@pytest.mark.parametrize(("finished", "generating"), [(0, True), (2, True), (3, False)])
def test_it_generates_until_its_last_request_is_done(finished, generating):
    engine = SimpleNamespace(submit=lambda requests: SimpleNamespace(done=lambda: finished))
    assert pending_on(engine).generating() == generating


def test_no_engine_and_one_that_refused_generate_nothing():
    def refuse(requests):
        raise EngineError("died")

    assert not pending_on(None).generating()
    assert not pending_on(SimpleNamespace(submit=refuse)).generating()
