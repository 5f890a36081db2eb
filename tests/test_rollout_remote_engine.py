"""rollout/remote_engine.py and rollout/engine_host.py: an engine is the same from afar, and so are its failures."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import Future
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from respec_trainer.errors import EngineError, ProofError
from respec_trainer.rollout.engine import RolloutEngine, TensorSpec
from respec_trainer.rollout.engine_host import EngineHost
from respec_trainer.rollout.link import hang_up
from respec_trainer.rollout.remote_engine import Caller, RemoteEngine
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang_args import EngineSettings

REQUESTS = [Request(str(i), (i,), SamplingParams(max_new_tokens=4)) for i in range(3)]
SPEC = TensorSpec("weight", "float32", (2, 3))


class Engine:
    """Notes what it is asked. Its rollout ends when `finish` is set, its broadcasts when `arrived` is."""

    def __init__(self, settings):
        self.settings, self.log = settings, []
        self.failure, self.versions = EngineError("not running"), {"target": "initial"}
        self.finish, self.arrived = threading.Event(), Future()

    def __getattr__(self, name):
        return lambda *args: self.log.append((name, *args))

    def start(self):
        self.failure = None

    def shutdown(self):
        self.failure = EngineError("not running")
        self.finish.set()

    def submit(self, requests):
        return SimpleNamespace(collect=lambda: self.collect(requests), done=lambda: 1, delivered=lambda: ["some"])

    def collect(self, requests):
        self.finish.wait(10)
        if self.failure is not None:
            raise self.failure
        return [request.key for request in requests]

    def receive_broadcast(self, specs, role, group):
        self.log.append((specs, role, group))
        return self.arrived

    def digests(self, role):
        raise ProofError(f"no digests of {role}")

    def stats(self):
        return 1 / 0


@pytest.fixture
def pair():
    """(the engine, the same from afar)"""
    ours, theirs = Pipe()
    host = EngineHost(theirs, Engine)
    thread = threading.Thread(target=host.run)
    thread.start()
    engine = RemoteEngine(EngineSettings("folder", seed=7), 0)
    engine._caller = Caller(ours, "the host of engine 0")
    engine._ask("make", engine.settings)
    engine.start()
    yield host.engine, engine
    engine.release()
    thread.join(10)
    assert not thread.is_alive() and str(host.engine.failure) == "not running", "a host ends its engine"


def test_it_has_every_method_of_an_engine():
    ours = dict(inspect.getmembers(RemoteEngine))
    for name, method in inspect.getmembers(RolloutEngine, inspect.isfunction):
        assert list(inspect.signature(ours[name]).parameters) == list(inspect.signature(method).parameters), name


def test_calls_arrive_as_they_were_made(pair):
    engine, remote = pair
    assert engine.settings == remote.settings
    assert remote.failure is None and remote.versions == {"target": "initial"}
    remote.begin_weight_update("target", {"a"})
    remote.end_weight_update("draft", "drafter-3")
    remote.wake("weights")
    remote.distrust("moved")
    remote.join_group("group", "host", 5, 3, 1, "gloo").result(10)
    assert engine.log == [
        ("begin_weight_update", "target", ["a"]),
        ("end_weight_update", "draft", "drafter-3"),
        ("wake", "weights"),
        ("distrust", "moved"),
        ("join_group", "group", "host", 5, 3, 1, "gloo"),
    ]


def test_what_takes_its_time_holds_nothing_up(pair):
    engine, remote = pair
    arrives = remote.receive_broadcast([SPEC], "target", "group")
    pending, samples = remote.submit(REQUESTS), []
    collecting = threading.Thread(target=lambda: samples.extend(pending.collect()))
    collecting.start()
    assert pending.done() == 1 and remote.versions, "while it is being collected"
    assert not arrives.done() and not samples
    engine.arrived.set_result(None)
    assert arrives.result(10) is None and engine.log == [([SPEC], "target", "group")]
    engine.finish.set()
    collecting.join(10)
    assert samples == ["0", "1", "2"] and pending.done() == 3
    assert pending.collect() == samples, "twice"


def test_errors_come_back_as_they_are(pair):
    engine, remote = pair
    with pytest.raises(ProofError, match="no digests of draft"):
        remote.digests("draft")
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        remote.stats()
    failing = remote.receive_broadcast([SPEC], "target", "group")
    engine.arrived.set_exception(EngineError("too late"))
    with pytest.raises(EngineError, match="too late"):
        failing.result(10)
    with pytest.raises(EngineError, match="resync.transport"):
        remote.receive_tensors([], "target")


def test_an_engine_that_dies_can_be_asked_what_it_delivered_and_started_anew(pair):
    engine, remote = pair
    pending = remote.submit(REQUESTS)
    engine.failure = EngineError("killed")
    engine.finish.set()
    with pytest.raises(EngineError, match="killed"):
        pending.collect()
    assert str(remote.failure) == "killed" and pending.delivered() == ["some"]
    remote.shutdown()
    remote.start()
    assert remote.failure is None and remote.submit(REQUESTS).collect() == ["0", "1", "2"]


def test_a_host_that_is_gone_is_a_dead_engine(pair):
    _, remote = pair
    pending = remote.submit(REQUESTS)
    waits = remote.receive_broadcast([SPEC], "target", "group")
    hang_up(remote._caller.connection)
    for ask in (pending.collect, waits.result, remote.start, lambda: remote.submit(REQUESTS)):
        with pytest.raises(EngineError, match="lost the connection to the host of engine 0: it ended"):
            ask()
    assert "lost the connection" in str(remote.failure)
    remote.shutdown()


def test_before_it_is_started(tmp_path):
    remote = RemoteEngine(EngineSettings("folder"), 0)
    assert "not running" in str(remote.failure)
    remote.shutdown()
    remote.release()
    with pytest.raises(EngineError, match="call start"):
        remote.submit(REQUESTS)


def test_hanging_up_ends_a_host_that_has_made_no_engine():
    ours, theirs = Pipe()
    thread = threading.Thread(target=EngineHost(theirs, Engine).run)
    thread.start()
    hang_up(ours)
    thread.join(10)
    assert not thread.is_alive()
