"""Faults planted in pushes to a live engine: each is found, named, forbids generation, and a whole push repairs it."""

from __future__ import annotations

import contextlib
import re
import time
from types import SimpleNamespace

import pytest
import torch

from respec_trainer.errors import EngineError, ProofError, ResyncError
from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import PROMPT, greedy, live, step

UP = "model.layers.1.mlp.up_proj.weight"


@contextlib.contextmanager
def replaced(owner, name, function):
    """Replace `owner.name` by `function(original, *args)` inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: function(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def selector_all(setup):
    """sglang's own default, which writes the target's tensors into the drafter too: here some do not fit."""

    def send(original, updater, doing, method, message, **fields):
        fields |= {"selector": "all"} if "names" in fields else {}
        return original(updater, doing, method, message, **fields)

    from respec_trainer.rollout.sglang.weights import WeightUpdater

    return replaced(WeightUpdater, "send", send)


def dropped(setup):
    """One tensor is never sent."""

    def start(original, bucket, specs, role, doing):
        kept = {name: shape for name, shape in specs.items() if name != UP}
        return original([pair for pair in bucket if pair[0] in kept], kept, role, doing)

    return replaced(setup.resync.transport, "start", start)


def bit_flipped(setup):
    """One bit of one tensor changes on the way."""

    def start(original, bucket, specs, role, doing):
        sent = [(name, tensor.clone()) for name, tensor in bucket]
        for name, tensor in sent:
            if name == UP:
                tensor.view(torch.int32).view(-1)[7] ^= 1
        return original(sent, specs, role, doing)

    return replaced(setup.resync.transport, "start", start)


def qkv_in_wrong_order(setup):
    """Keys and values are exchanged: a mistake of the map between layouts, so the engine holds what was sent."""
    from respec_trainer.resync import stream

    def copy(original, name, shards, config, out):
        if name.endswith("linear_qkv.weight"):
            layer = name.split(".")[2]
            k, v = (f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "kv")
            out = {**out, k: out[v], v: out[k]}
        original(name, shards, config, out)

    return replaced(stream, "copy_to_hf", copy)


@contextlib.contextmanager
def drafter_lost(setup):
    """The engine's drafter is overwritten, as by a sleep, without a report."""
    engine = setup.engine
    if engine is not None:
        lost = [(name, torch.zeros_like(tensor)) for name, tensor in setup.drafter.named_tensors()]
        engine.begin_weight_update("draft")
        engine.receive_tensors(lost, "draft").result(60)
        engine.end_weight_update("draft", "drafter-0")
    yield


@contextlib.contextmanager
def not_a_number(setup):
    """A weight is NaN in one rank's shard."""
    weight = dict(setup.actor.engine.module.named_parameters())["decoder.layers.1.mlp.linear_fc1.weight"]
    before = weight.data[0, 0].clone()
    weight.data[0, 0] = float("nan") if setup.actor.topology.rank == 1 else before
    yield
    weight.data[0, 0] = before


FAULTS = [selector_all, dropped, bit_flipped, qkv_in_wrong_order, drafter_lost, not_a_number]


def plant_all(config):
    """Return, for each fault, the error, the error of generation then, and whether a whole push repaired it."""
    out = {}
    with live(config) as setup:
        for fault in FAULTS:
            setup.rollouts.sleep()
            step(setup.actor)
            setup.said.clear()
            with fault(setup):
                error = attempt(setup.rollouts.push)
                refused = attempt(lambda: greedy(setup.fleet))
            said = list(setup.said)
            setup.rollouts.push()
            spoken = greedy(setup.fleet)
            setup.rollouts.sleep()
            tokens, _ = setup.actor.generate_greedy([PROMPT], 12)
            mended = spoken.response_ids == tokens[0] and spoken.actor_version == setup.actor.version
            out[fault.__name__] = error, refused, said, mended
    return out


def attempt(action):
    try:
        action()
    except (ResyncError, EngineError) as error:
        return type(error), str(error)
    return None


@pytest.fixture(scope="module")
def planted(tmp_path_factory, random_pair):
    target, drafter = random_pair
    config = smallest_config(
        tmp_path_factory.mktemp("faults"),
        f"model.path={target}",
        "model.dtype=fp32",
        f"drafter.path={drafter}",
        "speculation.algorithm=eagle3",
        "actor.parallel.tp=2",
        "rollout.engine.span=2",
        "actor.optim.lr=0.01",
        "resync.bucket_mb=2",
        "resync.timeout=20",
    )
    return run_ranks(2, plant_all, config, timeout=240)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("selector_all", EngineError, ["bucket 1 of 1 of actor-1, model.embed_tokens.weight to", "loaded_weight"]),
        ("dropped", EngineError, ["1 target tensors never arrived", UP]),
        ("bit_flipped", ProofError, ["the engine's target weights are not actor-", f"{UP} differs"]),
        ("qkv_in_wrong_order", ProofError, ["log-probs are not the actor's", "laid out differently"]),
    ],
)
def test_a_fault_is_named_and_forbids_generation(planted, fault, kind, words):
    for rank in planted:
        error, refused, _, mended = rank[fault]
        assert error is not None and error[0] is kind and all(word in error[1] for word in words), error
        assert refused is not None and ("in doubt" in refused[1] or "during an update" in refused[1])
        assert mended


def test_a_drafter_that_was_lost_is_reported_and_pushed_again(planted):
    for rank in planted:
        error, refused, said, mended = rank["drafter_lost"]
        assert error is None and refused is None and mended, "the second push, whole, mends it"
        assert len(said) == 1 and "draft weights are not drafter-0" in said[0] and "the engine's sleep" in said[0]


def test_a_transient_fault_costs_one_push(planted):
    """`bit_flipped` lasts for both tries; the message after the first is the same."""
    said = planted[0]["bit_flipped"][2]
    assert len(said) == 1 and f"{UP} differs" in said[0] and "pushed again, whole" in said[0]


def test_weights_that_are_not_finite_stay_here_and_the_engine_goes_on(planted):
    for rank in planted:
        error, refused, said, mended = rank["not_a_number"]
        assert error[0] is ResyncError and "rank 1: actor-6 is not sent" in error[1]
        assert "decoder.layers.1.mlp.linear_fc1.weight holds NaN" in error[1] and "engines keep actor-5" in error[1]
        assert refused is None, "the last good version can be used"
        assert mended and not said


class Sink:
    """A transport without engines."""

    receivers, takes_views = [0], True

    def connect(self):
        pass

    def start(self, bucket, specs, role, doing):
        from respec_trainer.resync.transport import Sending

        return Sending(doing, 60)


def push_late(config, when):
    """Return the error of a push, and its time, when rank 1 is late for the push or for a bucket of it."""
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.resync import Resync

    topology = init_parallel(config)
    actor = Actor(config, topology, total_updates=1)
    resync = Resync(config, actor, None, None, Sink())
    late = topology.rank == 1
    began = time.monotonic()
    if late and when == "push":
        time.sleep(config.resync.timeout * 2)
    if late and when == "bucket":  # a rank takes memory for its shards before it sends them
        take = resync.workspace.take
        resync.workspace.take = lambda *args: time.sleep(config.resync.timeout * 2) or take(*args)
    try:
        return attempt(resync.push), time.monotonic() - began
    finally:
        shutdown_parallel()


@pytest.fixture
def impatient(tmp_path, random_pair):
    settings = ["model.dtype=fp32", "actor.parallel.tp=2", "resync.timeout=2"]
    return smallest_config(tmp_path, f"model.path={random_pair[0]}", *settings)


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("push", r"actor-0 within 2 s \(resync.timeout\); the engines hold the weights of their folders: .*Ranks? 1"),
        ("bucket", r"rank 1 did not take part within 2 s \(resync.timeout\) in gathering model.embed_tokens.weight to"),
    ],
)
def test_a_late_rank_is_named_in_time(impatient, when, words):
    (error, seconds), _ = run_ranks(2, push_late, impatient, when, timeout=30)
    assert re.search(words, error[1], re.DOTALL), error
    assert issubclass(error[0], ResyncError) and seconds < 6


def test_a_rank_that_is_in_time_is_waited_for(impatient):
    assert all(error is None for error, _ in run_ranks(2, push_late, impatient, "never", timeout=30))


def test_another_architecture_is_refused_before_anything_is_sent(tmp_path, random_pair):
    config = smallest_config(tmp_path, f"model.path={random_pair[0]}", "model.dtype=fp32")
    ((kind, text),) = run_ranks(1, connect_to_another, config, timeout=60)
    assert kind is ResyncError and "model.norm.weight is of shape [32] in the engine and of shape [64]" in text
    assert "the engine's initial, the trainer's actor-0" in text


def connect_to_another(config):
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.resync import Resync
    from respec_trainer.rollout.sglang.weights import weight_shapes

    actor = Actor(config, init_parallel(config), total_updates=1)
    shapes = weight_shapes(config.model.path)
    engine = SimpleNamespace(
        weight_shapes=lambda role: shapes | {"model.norm.weight": (32,)}, versions={"target": "initial"}, failure=None
    )
    error = attempt(lambda: Resync(config, actor, None, engine, Sink()))
    shutdown_parallel()
    return error
