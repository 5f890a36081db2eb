"""rollout/fleet/fleet.py: running engines, their logs, and their depth choosers' states."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from respec_trainer.errors import EngineError, EngineLostError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.fleet.deal import Unit
from respec_trainer.rollout.fleet.fleet import RolloutFleet
from respec_trainer.rollout.fleet.pending import FleetPending
from respec_trainer.rollout.sample import Request, SamplingParams
from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks

REQUESTS = [Request(str(i), (i, i), SamplingParams(max_new_tokens=4)) for i in range(3)]


def pending_on(engine) -> FleetPending:
    fleet = SimpleNamespace(engine=engine, resume=False, restore_chooser=lambda: None)
    return FleetPending(fleet, REQUESTS, [Unit((0, 1, 2), 3.0)])


@pytest.mark.parametrize(("finished", "generating"), [(0, True), (2, True), (3, False)])
def test_it_generates_until_its_last_request_is_done(finished, generating):
    engine = SimpleNamespace(submit=lambda requests: SimpleNamespace(done=lambda: finished))
    assert pending_on(engine).generating() == generating


def test_no_engine_and_one_that_refused_generate_nothing():
    def refuse(requests):
        raise EngineError("died")

    assert not pending_on(None).generating()
    assert not pending_on(SimpleNamespace(submit=refuse)).generating()


class LoggingEngine:
    """An engine that logs a batch for each request, with as many sequences as the prompt has tokens."""

    def __init__(self, index, logs=True):
        self.index, self.logs, self.failure = index, logs, None
        self.log, self.failures, self.state = [], 0, ""

    def start(self):
        self.failure, self.state = None, "new"

    def restore_depth_chooser(self, state):
        self.state = state

    def shutdown(self):
        self.failure = EngineError("not running")

    def release(self):
        self.log.append("released")

    def submit(self, requests):
        self.log += [len(request.prompt_ids) for request in requests]
        self.state += f" {len(requests)}"
        return SimpleNamespace(collect=lambda: [f"{self.index}:{request.key}" for request in requests])

    def take_decode_log(self):
        if self.failure is not None:
            raise self.failure
        batches, self.log = self.log if self.logs else [], []
        columns = {"start": np.arange(float(len(batches))), "batch": np.array(batches)}
        return DecodeLog(**columns, failures=self.failures, state=self.state)


def prompts(*lengths):
    return [Request(str(i), (1,) * n, SamplingParams(max_new_tokens=4)) for i, n in enumerate(lengths)]


def as_lists(logs):
    return [(log.batch.tolist(), log.failures) for log in logs]


def play(config, logs):
    """Run a few phases on one of two ranks; return the answers of `ask_each` and the logs received."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fleet = RolloutFleet(config, lambda index: LoggingEngine(index, logs[index]), None, "cpu")
    received = []
    fleet.engine.submit(prompts(1, 2)[: fleet.index + 1])
    received.append(as_lists(fleet.take_decode_log()))
    received.append(as_lists(fleet.take_decode_log()))
    fleet.engine.submit(prompts(3))
    answers = fleet.ask_each(prompts(9)[0])  # like the canary, after a push that interrupted the phase
    fleet.engine.submit(prompts(4))
    received.append(as_lists(fleet.take_decode_log()))
    fleet.engine.failures = int(fleet.index == 1)
    fleet.ask_each(prompts(9)[0])
    received.append(as_lists(fleet.take_decode_log()))
    return answers, received


def test_every_rank_receives_the_logs_of_all_engines(tmp_path):
    (answers, received), (other_answers, other_received) = run_ranks(2, play, smallest_config(tmp_path), [True, True])
    assert received == other_received and answers == other_answers == ["0:0", "1:0"]
    assert received[0] == [([1], 0), ([1, 2], 0)]
    assert received[1] == [], "taken once"
    assert received[2] == [([3], 0), ([4], 0)] * 2, "without the batch of ask_each, and in two logs"
    assert sum(failures for _, failures in received[3]) >= 1, "failures during ask_each are reported too"


def test_engines_that_log_nothing_add_nothing(tmp_path):
    (_, received), _ = run_ranks(2, play, smallest_config(tmp_path), [False, True])
    assert received[0] == [([1, 2], 0)] and received[2] == [([3], 0), ([4], 0)]


def lose(config):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fleet = RolloutFleet(config, LoggingEngine, None, "cpu")
    fleet.engine.submit(prompts(5))
    if fleet.index == 1:
        fleet.engine.failure = EngineError("died")
    try:
        fleet.take_decode_log()
    except EngineLostError as error:
        return str(error)
    return None


def test_a_dead_engine_raises_on_every_rank(tmp_path):
    for error in run_ranks(2, lose, smallest_config(tmp_path)):
        assert error == "engine of rank 1: died"


def remember(config):
    """Return the chooser's state in one of two engines at each phase, through a restart and a resumed run."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fleet, states = RolloutFleet(config, LoggingEngine, None, "cpu"), []

    def phase():
        fleet.start(prompts(1, 1, 1))
        state = fleet.engine.state
        fleet.take_decode_log()
        fleet.ask_each(prompts(9)[0])
        states.append((state, fleet.state_dict()["depth"]))

    phase()
    if fleet.index == 1:
        fleet.engine.failure = EngineError("died")
    fleet.restart()
    fleet.ask_each(prompts(9)[0])
    phase()
    resumed = RolloutFleet(config, LoggingEngine, None, "cpu")
    resumed.load_state_dict(fleet.state_dict())
    resumed.ask_each(prompts(9)[0])
    fleet = resumed
    phase()
    return states


def test_the_choosers_state_survives_their_engines(tmp_path):
    """The canary between an engine's start and its first rollout does not change the state, which replaces its own."""
    first, second = run_ranks(2, remember, smallest_config(tmp_path))
    assert first == [("new 2", "new 2 1"), ("new 2 1 1 2", "new 2 1 1 2 1"), ("new 2 1 1 2 1 2", "new 2 1 1 2 1 2 1")]
    assert second == [("new 1", "new 1 1"), ("new 1 1 1", "new 1 1 1 1"), ("new 1 1 1 1 1", "new 1 1 1 1 1 1")]


def end(config):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    fleet = RolloutFleet(config, LoggingEngine, None, "cpu")
    fleet.shutdown()
    return str(fleet.engine.failure), fleet.engine.log


def test_at_the_end_engines_are_shut_down_and_released(tmp_path):
    assert run_ranks(2, end, smallest_config(tmp_path)) == [("not running", ["released"])] * 2


def test_an_engine_without_a_chooser_s_state_receives_none(tmp_path):
    engine = SimpleNamespace(take_decode_log=DecodeLog)  # it has no restore_depth_chooser
    fleet = SimpleNamespace(engine=engine, depth_state="", must_restore=True)
    RolloutFleet.restore_chooser(fleet)
    RolloutFleet.take_log(fleet)
    assert (fleet.depth_state, fleet.must_restore) == ("", False)
