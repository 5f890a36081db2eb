"""Live engines that are killed, and that hang, in the middle of generating: what comes back is as if nothing happened.

Two ranks share one engine, in float32 and greedy, so that a response drawn by two lives must equal an undisturbed one.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from tests.integration.resync.test_engine import folders  # noqa: F401 - a fixture
from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import live, step

NEW_TOKENS = 48
PROMPTS = [[5 + i, 9, 33 + i] for i in range(6)]


def survive(config, disturb, *args):
    """On one rank: responses undisturbed and disturbed, then what was counted; or the error that ended it."""
    from respec_trainer.errors import EngineLostError

    with live(config) as setup:
        rollouts = setup.rollouts
        rollouts.max_restarts = config.rollout.engine.max_restarts
        try:
            step(setup.actor)
            rollouts.push()
            calm = ask(rollouts)
            rollouts.metrics()
            began = time.monotonic()
            disturbed = disturb(rollouts, *args)
            return calm, disturbed, rollouts.metrics(), setup.said, time.monotonic() - began
        except EngineLostError as error:
            return str(error), rollouts.metrics()


def ask(rollouts, meanwhile=lambda: None):
    from respec_trainer.rollout.sample import Request, SamplingParams

    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    rollouts.start([Request(str(i), tuple(p), greedy) for i, p in enumerate(PROMPTS)])
    meanwhile()
    return rollouts.collect()


def while_generating(rollouts, number, kills, victim=0):
    """Signal the scheduler of rank `victim`'s engine once it has begun, in `kills` of its lives one after the other."""
    if torch.distributed.get_rank() != victim:
        return ask(rollouts)
    watch = threading.Thread(target=_signal, args=(rollouts.fleet.engine, number, kills), daemon=True)
    return ask(rollouts, watch.start)


def while_pushing(rollouts, number, victim=0):
    """Push the same weights again, and signal the scheduler of rank `victim`'s engine once the update has begun."""
    transport, sends = rollouts.resync.transport, []
    original = transport.start

    def start(bucket, specs, role, doing):
        sends.append(role)
        if len(sends) == 1 and transport.rank == victim:
            os.kill(transport.engine.process.children[0].pid, number)
        return original(bucket, specs, role, doing)

    transport.start = start
    rollouts.resync.held = {}
    rollouts.push()
    assert sends == ["target", "target", "draft"], "interrupted; then both models, whole"
    return ask(rollouts)


def _signal(engine, number, kills, after=12):
    struck = set()
    while len(struck) < kills:
        time.sleep(0.001)
        process = engine._process
        if process is None or process in struck or process.failure is not None:
            continue
        begun = [p.tokens for p in list(process.deliveries._progress.values()) if p.finish_reason is None]
        if begun and min(begun) >= after:
            struck.add(process)
            os.kill(process.children[0].pid, number)


def config_of(tmp_path, folders, *overrides):  # noqa: F811
    target, drafter = folders
    shape = ["actor.parallel.tp=2", "rollout.engine.span=2", "actor.optim.lr=0.01", "resync.bucket_mb=2"]
    paths = [f"model.path={target}", "model.dtype=fp32", f"drafter.path={drafter}", "speculation.algorithm=eagle3"]
    return smallest_config(tmp_path, "rollout.engine.resume=tokens", *paths, *shape, *overrides)


def check_whole(calm, disturbed):
    assert [s.key for s in disturbed] == [str(i) for i in range(len(PROMPTS))]
    assert [s.response_ids for s in disturbed] == [s.response_ids for s in calm]
    assert [s.prompt_ids for s in disturbed] == PROMPTS
    assert {s.actor_version for s in disturbed} == {"actor-1"}
    assert all(s.finish_reason == "length" and len(s.origins) == NEW_TOKENS for s in disturbed)
    given, wanted = (torch.tensor([s.sampler_logprobs for s in samples]) for samples in (disturbed, calm))
    assert torch.allclose(given, wanted, atol=1e-4)


def test_a_killed_scheduler_costs_nothing_but_time(tmp_path, folders):  # noqa: F811
    config = config_of(tmp_path, folders)
    first, second = run_ranks(2, survive, config, while_generating, signal.SIGKILL, 2, timeout=240)
    calm, disturbed, counts, said, _ = first
    check_whole(calm, disturbed)
    assert [s.response_ids for s in second[1]] == [s.response_ids for s in disturbed]
    assert max(s.restarts for s in disturbed) == 2 and min(s.restarts for s in calm) == 0
    assert counts["engine/restarts"] == 2 and counts["engine/lost_tokens"] == 0
    assert counts["engine/resumed_tokens"] >= 12
    assert "signal 9" in said[0] and "restart 2 of 3" in said[1]


def test_a_hanging_scheduler_is_noticed_in_time(tmp_path, folders):  # noqa: F811
    timeout = 35.0  # a restart must fit in it, on a busy machine too
    config = config_of(tmp_path, folders, f"rollout.engine.timeout={timeout}")
    first, _ = run_ranks(2, survive, config, while_generating, signal.SIGSTOP, 1, timeout=240)
    calm, disturbed, counts, said, seconds = first
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 1 and "not answered for 35 s" in said[0]
    assert timeout < seconds < timeout + 60


def test_too_many_deaths_end_the_run_on_every_rank(tmp_path, folders):  # noqa: F811
    limit = 1
    config = config_of(tmp_path, folders, f"rollout.engine.max_restarts={limit}")
    for error, counts in run_ranks(2, survive, config, while_generating, signal.SIGKILL, limit + 1, timeout=240):
        assert "signal 9" in error and "rollout.engine.max_restarts" in error
        assert counts["engine/restarts"] == limit


def test_the_other_engine_joins_the_new_group(tmp_path, folders):  # noqa: F811
    config = config_of(tmp_path, folders, "rollout.engine.span=1")
    first, _ = run_ranks(2, survive, config, while_generating, signal.SIGKILL, 1, 1, timeout=240)
    calm, disturbed, counts, said, _ = first
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 1 and "engine of rank 1" in said[0]
    assert [s.restarts for s in disturbed[:3]] == [0, 0, 0] and max(s.restarts for s in disturbed[3:]) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_push_that_is_interrupted_is_made_again(tmp_path, folders, number):  # noqa: F811
    config = config_of(tmp_path, folders, "rollout.engine.span=1", "resync.timeout=10")
    calm, disturbed, counts, said, _ = run_ranks(2, survive, config, while_pushing, number, 1, timeout=240)[0]
    check_whole(calm, disturbed)
    assert counts["engine/restarts"] == 2, "no engine is known to be whole"
    assert len(said) == 1
