"""generation.py and rollout/fleet/fleet.py on two ranks, each with an engine that dies on command.

Tests that all ranks get the error, which engine draws again, and when the run ends.
"""

from __future__ import annotations

import pytest

from respec_trainer.errors import EngineError, EngineLostError
from respec_trainer.rollout.sample import Request, Sample, SamplingParams
from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks

REQUESTS = [Request(str(i), (i, i), SamplingParams(max_new_tokens=4)) for i in range(6)]


class FakeEngine:
    """Draws token 10 * its index + the number of its start, four times. Each call in `deaths` kills it once."""

    def __init__(self, index, deaths):
        self.index, self.deaths = index, list(deaths)
        self.lives, self.version, self.failure, self.log = 0, "initial", EngineError("not running"), []

    def call(self, name):
        if self.failure is not None:
            raise self.failure
        if name in self.deaths:
            self.deaths.remove(name)
            self.failure = EngineError(f"died at {name}")
            raise self.failure

    def start(self):
        self.lives, self.version, self.failure = self.lives + 1, "initial", None
        self.log.append("start")
        self.call("start")

    def shutdown(self):
        self.failure = EngineError("not running")

    def submit(self, requests):
        self.call("submit")
        self.log.append([request.key for request in requests])
        return FakePending(self, requests)


class FakePending:
    def __init__(self, engine, requests):
        self.engine, self.requests = engine, requests

    def collect(self):
        self.engine.call("collect")
        return [self.draw(r, r.sampling.max_new_tokens, "length") for r in self.requests]

    def delivered(self):
        """Return partial samples: the first is finished, the second has one token, the others none."""
        reasons = ["length", "lost"] + ["lost"] * len(self.requests)
        counts = [self.requests[0].sampling.max_new_tokens, 1] + [0] * len(self.requests)
        return [self.draw(r, n, why) for r, n, why in zip(self.requests, counts, reasons, strict=False)]

    def draw(self, request, count, reason):
        token = 10 * self.engine.index + self.engine.lives
        tokens, logprobs = [token] * count, [-1.0] * count
        return Sample(request.key, list(request.prompt_ids), tokens, logprobs, reason, self.engine.version, "none")


class FakeResync:
    def __init__(self, engine, control):
        self.engine, self.control, self.pushes = engine, control, []

    def connect(self):
        self.pushes.append("connect")

    def take_bytes(self):
        return 0

    def push(self, whole, prove):
        from respec_trainer.collectives import agree
        from respec_trainer.errors import TransferError

        self.pushes.append(("push", prove))
        agree(lambda: self.engine.call("push"), self.engine, self.control, fatal=TransferError)
        self.engine.version = "actor-7"


class FakeActor:
    def offload(self, part=None):
        pass

    def onload(self, part=None):
        pass


def play(config, deaths, max_restarts):
    """Run one phase on one rank; return its samples, the requests to its engine, and the pushes."""
    import torch.distributed as dist

    from respec_trainer.generation import Generation
    from respec_trainer.rollout.fleet.fleet import RolloutFleet

    dist.init_process_group("gloo")
    fleet = RolloutFleet(config, lambda i: FakeEngine(i, deaths[i]), None, "cpu")
    rollouts = Generation(fleet, FakeResync(fleet.engine, None), FakeActor(), max_restarts, lambda text: None)
    try:
        rollouts.push()
        rollouts.start(REQUESTS)
        samples, error = rollouts.collect(), None
    except EngineLostError as raised:
        samples, error = None, str(raised)
    return samples, error, fleet.engine.log, rollouts.resync.pushes, rollouts.metrics()


def run(tmp_path, deaths, *overrides, max_restarts=3):
    config = smallest_config(tmp_path, "rollout.engine.resume=tokens", *overrides)
    return run_ranks(2, play, config, deaths, max_restarts)


def tokens(samples):
    return [(s.key, s.response_ids, s.restarts) for s in samples]


BYTES = {"resync/bytes": 0}
WHOLE = [(str(i), [1] * 4 if i < 3 else [11] * 4, 0) for i in range(6)]


def test_nothing_dies(tmp_path):
    first, second = run(tmp_path, [[], []])
    assert tokens(first[0]) == tokens(second[0]) == WHOLE
    assert first[3] == [("push", False)]
    assert first[4] == second[4] == {"engine/restarts": 0, "engine/lost_tokens": 0, "engine/resumed_tokens": 0, **BYTES}


def test_a_dead_engine_goes_on_from_its_tokens_and_the_other_is_not_asked_again(tmp_path):
    first, second = run(tmp_path, [[], ["collect"]])
    again = [("3", [11] * 4, 0), ("4", [11, 12, 12, 12], 1), ("5", [12] * 4, 0)]
    assert tokens(first[0]) == tokens(second[0]) == WHOLE[:3] + again
    assert {s.actor_version for s in first[0]} == {"actor-7"}
    assert first[2] == ["start", ["0", "1", "2"]]
    assert second[2] == ["start", ["3", "4", "5"], "start", ["4", "5"]]
    assert first[3] == second[3] == [("push", False), "connect", ("push", True)], "both ranks push, and prove"
    assert first[4] == {"engine/restarts": 1, "engine/lost_tokens": 0, "engine/resumed_tokens": 1, **BYTES}


def test_without_resuming_all_its_requests_are_drawn_again(tmp_path):
    first, second = run(tmp_path, [["collect"], []], "rollout.engine.resume=start")
    assert tokens(first[0]) == [(str(i), [2] * 4, 0) for i in range(3)] + WHOLE[3:]
    assert first[2] == ["start", ["0", "1", "2"]] * 2
    assert second[4] == {"engine/restarts": 1, "engine/lost_tokens": 5, "engine/resumed_tokens": 0, **BYTES}


@pytest.mark.parametrize("when", ["submit", "push"])
def test_death_outside_of_generation(tmp_path, when):
    first, second = run(tmp_path, [[when], []])
    lives = [2, 2] if when == "push" else [2, 1]  # a failed push ends all engines
    got = [[s.response_ids[0] for s in rank[0]] for rank in (first, second)]
    assert got[0] == got[1] == [lives[0]] * 3 + [10 + lives[1]] * 3
    assert {s.actor_version for s in first[0]} == {"actor-7"}
    assert first[4]["engine/restarts"] == sum(lives) - 2


def test_deaths_follow_each_other(tmp_path):
    first, _ = run(tmp_path, [["collect", "collect"], ["collect"]])
    assert [s.key for s in first[0]] == [r.key for r in REQUESTS]
    assert first[0][1].restarts == 1 and first[4]["engine/restarts"] == 3


def test_enough_is_enough_on_every_rank(tmp_path):
    results = run(tmp_path, [["collect"] * 3, []], max_restarts=2)
    for samples, error, *_ in results:
        assert samples is None
        assert "engine of rank 0: died at collect" in error and "rollout.engine.max_restarts" in error
    assert results[0][4]["engine/restarts"] == 2
