"""Live engines that are killed, or hang, while they generate: the responses are as if nothing happened.

The runs are in float32 and greedy, so a response drawn by two engine processes must equal an undisturbed one.
test_generation.py tests the limit of restarts, with engines that die on command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import torch

from respec_trainer.errors import EngineError
from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import live, step

NEW_TOKENS = 48
TIMEOUT = 20  # seconds; a restart must take less, also on a busy machine
PROMPTS = [[5 + i, 9, 33 + i] for i in range(6)]


def survive(config, disturbances):
    """Return the undisturbed responses; and for each disturbance responses, counts, messages and seconds."""
    with live(config) as setup:
        rollouts, outcomes = setup.rollouts, {}
        rollouts.max_restarts = config.rollout.engine.max_restarts
        step(setup.actor)
        rollouts.push()
        calm = ask(rollouts)
        for name, (disturb, *args) in disturbances.items():
            rollouts.metrics()
            setup.said.clear()
            began = time.monotonic()
            disturbed = disturb(rollouts, *args)
            outcomes[name] = disturbed, rollouts.metrics(), list(setup.said), time.monotonic() - began
    return calm, outcomes


def ask(rollouts, meanwhile=lambda: None):
    from respec_trainer.rollout.sample import Request, SamplingParams

    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    rollouts.start([Request(str(i), tuple(p), greedy) for i, p in enumerate(PROMPTS)])
    meanwhile()
    return rollouts.collect()


def while_generating(rollouts, number, kills, victim=0):
    """Signal the scheduler of rank `victim`'s engine when it has begun, `kills` times, after each restart."""
    if torch.distributed.get_rank() != victim:
        return ask(rollouts)
    watch = threading.Thread(target=_signal, args=(rollouts, number, kills), daemon=True)
    return ask(rollouts, watch.start)


def while_pushing(rollouts, number, victim=0):
    """Push the same weights again, and signal the scheduler of rank `victim`'s engine when the update has begun."""
    transport, sends = rollouts.resync.transport, []
    original = transport.start

    def start(bucket, specs, role, doing):
        sends.append(role)
        if len(sends) == 1 and transport.rank == victim:
            os.kill(transport.engine.process.children[0].pid, number)
        return original(bucket, specs, role, doing)

    transport.start = start
    rollouts.resync.held = {}
    try:
        rollouts.push()
    finally:
        transport.start = original
    assert sends == ["target", "target", "draft"], "interrupted; then both models, whole"
    return ask(rollouts)


def _signal(rollouts, number, kills, after=12):
    """Wait until every unfinished response has `after` tokens from this process of the engine."""
    struck, engine = set(), rollouts.fleet.engine
    while len(struck) < kills:
        time.sleep(0.001)
        with contextlib.suppress(EngineError):  # between two processes
            process = engine.process
            if process in struck or engine.failure is not None:
                continue
            samples = [sample for part in rollouts.pending.parts for sample in part.delivered()]
            begun = [len(sample.response_ids) for sample in samples if sample.finish_reason == "lost"]
            if begun and min(begun) >= after:
                struck.add(process)
                os.kill(process.children[0].pid, number)


def check_whole(calm, disturbed):
    assert [s.key for s in disturbed] == [str(i) for i in range(len(PROMPTS))]
    assert [s.response_ids for s in disturbed] == [s.response_ids for s in calm]
    assert [s.prompt_ids for s in disturbed] == PROMPTS
    assert {s.actor_version for s in disturbed} == {"actor-1"}
    assert all(s.finish_reason == "length" and len(s.origins) == NEW_TOKENS for s in disturbed)
    given, wanted = (torch.tensor([s.sampler_logprobs for s in samples]) for samples in (disturbed, calm))
    assert torch.allclose(given, wanted, atol=1e-4)


def play(folder, pair, disturbances, *overrides):
    """Return the results of `survive` on rank 0 and rank 1."""
    target, drafter = pair
    shape = ["actor.parallel.tp=2", "actor.optim.lr=0.01", "resync.bucket_mb=2", "rollout.engine.resume=tokens"]
    paths = [f"model.path={target}", "model.dtype=fp32", f"drafter.path={drafter}", "speculation.algorithm=eagle3"]
    return run_ranks(2, survive, smallest_config(folder, *paths, *shape, *overrides), disturbances, timeout=400)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, random_pair):
    """Disturb one engine that both ranks use."""
    disturbances = {"killed": (while_generating, signal.SIGKILL, 2), "hung": (while_generating, signal.SIGSTOP, 1)}
    limits = ["rollout.engine.span=2", f"rollout.engine.timeout={TIMEOUT}"]
    return play(tmp_path_factory.mktemp("shared"), random_pair, disturbances, *limits)


@pytest.fixture(scope="module")
def own(tmp_path_factory, random_pair):
    """Disturb the second of two engines, one on each rank."""
    disturbances = {
        "killed": (while_generating, signal.SIGKILL, 1, 1),
        "killed in a push": (while_pushing, signal.SIGKILL, 1),
        "hung in a push": (while_pushing, signal.SIGSTOP, 1),
    }
    limits = ["rollout.engine.span=1", "resync.timeout=10"]
    return play(tmp_path_factory.mktemp("own"), random_pair, disturbances, *limits)


def test_a_killed_scheduler_costs_nothing_but_time(shared):
    (calm, first), (_, second) = shared
    disturbed, counts, said, _ = first["killed"]
    check_whole(calm, disturbed)
    assert [s.response_ids for s in second["killed"][0]] == [s.response_ids for s in disturbed]
    assert max(s.restarts for s in disturbed) == 2 and min(s.restarts for s in calm) == 0
    assert counts["engine/restarts"] == 2 and counts["engine/lost_tokens"] == 0
    assert counts["engine/resumed_tokens"] >= 12
    assert "signal 9" in said[0] and "restart 2 of 3" in said[1]


def test_a_hanging_scheduler_is_noticed_in_time(shared):
    calm, outcomes = shared[0]
    disturbed, counts, said, seconds = outcomes["hung"]
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 1 and f"not answered for {TIMEOUT} s" in said[0]
    assert TIMEOUT < seconds < TIMEOUT + 60


def test_the_other_engine_joins_the_new_group(own):
    calm, outcomes = own[0]
    disturbed, counts, said, _ = outcomes["killed"]
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 1 and "engine of rank 1" in said[0]
    assert [s.restarts for s in disturbed[:3]] == [0, 0, 0] and max(s.restarts for s in disturbed[3:]) == 1


@pytest.mark.parametrize("fault", ["killed in a push", "hung in a push"])
def test_a_push_that_is_interrupted_is_made_again(own, fault):
    calm, outcomes = own[0]
    disturbed, counts, said, _ = outcomes[fault]
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 2, "no engine is known to be whole"
    assert len(said) == 1
