"""rollout/remote/engine.py and rollout/remote/host.py: a remote engine and its failures are like a local one's."""

from __future__ import annotations

import inspect
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from respec_trainer import hosts
from respec_trainer.config import EngineConfig
from respec_trainer.errors import ConfigError, EngineError, EngineLostError, ProofError
from respec_trainer.generation import Generation
from respec_trainer.hosts import HostFacts
from respec_trainer.network import free_port
from respec_trainer.rollout.engine import RolloutEngine, TensorSpec
from respec_trainer.rollout.fleet.deal import Unit
from respec_trainer.rollout.fleet.fleet import RolloutFleet
from respec_trainer.rollout.fleet.pending import FleetPending
from respec_trainer.rollout.remote import host as engine_host
from respec_trainer.rollout.remote.engine import RemoteEngine
from respec_trainer.rollout.remote.host import EngineHost
from respec_trainer.rollout.remote.link import HostAbsentError, LinkLostError, close, cut, job_store, offer, reach
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.settings import EngineSettings

REQUESTS = [Request(str(i), (i,), SamplingParams(max_new_tokens=4)) for i in range(3)]
SPEC = TensorSpec("weight", "float32", (2, 3))


class Engine:
    """An engine that records its calls. Rollouts end when `finish` is set, broadcasts when `arrived` is resolved."""

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

    def weight_shapes(self, role):
        return 1 / 0


class Host(threading.Thread):
    """A host of engine 0, in a thread. `error` is the exception that ended it."""

    def __init__(self):
        super().__init__()
        self.error = self.host = None
        self.start()

    def run(self):
        try:
            self.host = EngineHost(offer(job_store(10), 0), "rank 0", Engine)
            self.host.run()
        except Exception as error:
            self.error = error

    def ended(self):
        """Wait for the host and its engine to end; return `error`."""
        self.join(10)
        assert not self.is_alive()
        assert self.host.engine is None or str(self.host.engine.failure) == "not running"
        return self.error


@pytest.fixture
def job(monkeypatch):
    """The job's store, as its first rank makes it; ranks and hosts find it."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@pytest.fixture
def pair(job):
    """(the engine, its RemoteEngine)"""
    thread = Host()
    remote = RemoteEngine(EngineSettings("folder", seed=7), 0)
    remote.start()
    yield thread.host.engine, remote
    remote.release()
    assert thread.ended() is None


def impatient(timeout) -> RemoteEngine:
    return RemoteEngine(EngineSettings("folder", engine=EngineConfig(timeout=timeout), seed=7), 0)


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


def test_slow_calls_do_not_block_others(pair):
    engine, remote = pair
    arrives = remote.receive_broadcast([SPEC], "target", "group")
    pending, samples = remote.submit(REQUESTS), []
    collecting = threading.Thread(target=lambda: samples.extend(pending.collect()))
    collecting.start()
    assert pending.done() == 1 and remote.versions, "during the collection"
    assert not arrives.done() and not samples
    engine.arrived.set_result(None)
    assert arrives.result(10) is None and engine.log == [([SPEC], "target", "group")]
    engine.finish.set()
    collecting.join(10)
    assert samples == ["0", "1", "2"] and pending.done() == 3
    assert pending.collect() == samples, "twice"


def test_errors_are_returned_with_their_types(pair):
    engine, remote = pair
    with pytest.raises(ProofError, match="no digests of draft"):
        remote.digests("draft")
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        remote.weight_shapes("draft")
    failing = remote.receive_broadcast([SPEC], "target", "group")
    engine.arrived.set_exception(EngineError("too late"))
    with pytest.raises(EngineError, match="too late"):
        failing.result(10)
    with pytest.raises(EngineError, match="resync.transport"):
        remote.receive_tensors([], "target")


def test_a_dead_engine_returns_what_it_delivered_and_can_start_again(pair):
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


def test_a_host_that_is_gone_is_a_dead_engine_until_another_takes_its_place(job):
    first, remote = Host(), impatient(5)
    remote.start()
    remote.start()  # its second start, on this host
    pending = remote.submit(REQUESTS)
    waits = remote.receive_broadcast([SPEC], "target", "group")
    cut(first.host.connection)
    for ask in (pending.collect, pending.delivered, waits.result, lambda: remote.submit(REQUESTS)):
        with pytest.raises(EngineError, match=f"lost the connection to the host of engine 0, {remote.host}: it ended"):
            ask()
    assert "lost the connection" in str(remote.failure)
    remote.shutdown()
    assert isinstance(first.ended(), LinkLostError), "its supervisor starts it again"
    second = Host()
    remote.start()
    second.host.engine.finish.set()
    assert remote.failure is None and remote.submit(REQUESTS).collect() == ["0", "1", "2"]
    assert second.host.engine.settings == replace(remote.settings, seed=7 + 2 * 1_000_003), "no seed is used twice"
    remote.release()
    assert second.ended() is None


def test_a_host_that_does_not_return_is_named(job):
    host, remote = Host(), impatient(0.5)
    remote.start()
    cut(host.host.connection)
    host.ended()
    with pytest.raises(HostAbsentError, match=rf"none came within 0.5 s .*start its ranks \(it was {remote.host}\)"):
        remote.start()
    assert "not running" in str(remote.failure)


def test_a_run_waits_once_for_a_host_that_does_not_return(job):
    """A lost engine is not generating, so that callers stop waiting for its responses, and get its error."""
    host, remote = Host(), impatient(0.5)
    remote.start()
    fleet = RolloutFleet.__new__(RolloutFleet)
    fleet.engine, fleet.index, fleet.owners, fleet.counts, fleet.must_restore = remote, 0, [0], Counter(), False
    fleet.resume, fleet.shares_devices, fleet.agree = False, False, agree
    pending = FleetPending(fleet, REQUESTS, [Unit((0, 1, 2), 3.0)])
    assert pending.generating()
    cut(host.host.connection)
    host.ended()
    assert not pending.generating()
    notices = []
    rollouts = Generation(fleet, SimpleNamespace(), SimpleNamespace(), 3, notices.append)
    with pytest.raises(HostAbsentError, match="none came within 0.5 s"):
        rollouts.push()
    assert fleet.counts["restarts"] == 1 and notices == ["engine of rank 0; restart 1 of 3 in this phase"]


def agree(action):
    """Stand-in for `RolloutFleet.agree` with one rank."""
    try:
        return [action()]
    except EngineError as error:
        raise EngineLostError("engine of rank 0") from error


class SilentConnection:
    """A connection that sends nothing, like that of a stopped process."""

    def __init__(self, connection):
        self.connection = connection

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def send(self, _message):
        pass


def test_a_busy_host_counts_as_alive_and_one_that_hangs_as_lost(job, monkeypatch):
    host, remote = Host(), impatient(1.0)
    remote.start()
    monkeypatch.setattr(Engine, "weight_shapes", lambda self, role: time.sleep(1.5))
    remote.weight_shapes("draft")
    assert remote.failure is None

    def hang(engine, role):
        host.host.connection = SilentConnection(host.host.connection)
        engine.finish.wait(10)

    monkeypatch.setattr(Engine, "weight_shapes", hang)
    with pytest.raises(EngineError, match="gave no sign of life for 1 s"):
        remote.weight_shapes("draft")
    host.host.engine.finish.set()
    host.join(10)


def test_hosts_that_do_not_match_are_refused(job, monkeypatch):
    here = HostFacts.here()
    old = replace(here, host="node7", python="3.10.1", gpus=here.gpus + 8, ranks=8, code="abc")
    monkeypatch.setattr(engine_host, "HostFacts", SimpleNamespace(here=lambda: old))
    host, remote = Host(), impatient(5)
    with pytest.raises(EngineError) as refusal:
        remote.start()
    text = str(refusal.value)
    assert f"python: {here.python} on {here.host}, which trains, 3.10.1 on node7" in text and "abc on node7" in text
    assert "the host of engine 0, node7 does not match" in text and "GPUs" not in text and "ranks of a host" not in text
    refused = host.ended()
    assert isinstance(refused, ConfigError) and str(refused) == text, "starting the host again would not help"
    assert "not running" in str(remote.failure)
    monkeypatch.setattr(hosts, "code_digest", lambda: "new files, under a run that has loaded the old ones")
    monkeypatch.setattr(engine_host, "HostFacts", SimpleNamespace(here=lambda: here))
    host = Host()
    remote.start()
    remote.release()
    assert host.ended() is None


def test_before_it_is_started(tmp_path):
    remote = RemoteEngine(EngineSettings("folder"), 0)
    assert "not running" in str(remote.failure)
    remote.shutdown()
    remote.release()
    with pytest.raises(EngineError, match="call start"):
        remote.submit(REQUESTS)


def test_a_host_that_has_made_no_engine_ends_with_its_rank(job):
    host = Host()
    close(reach(job_store(5), 0, 5))
    assert isinstance(host.ended(), LinkLostError) and "rank 0, for which" in str(host.error)
