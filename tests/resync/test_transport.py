"""resync/transport.py: the transport of each topology, refusals, and the wait for a bucket."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest

from respec_trainer.errors import ConfigError, EngineError, TransferError
from respec_trainer.resync.broadcast import BroadcastTransport
from respec_trainer.resync.ipc import IPCTransport
from respec_trainer.resync.transport import Sending, attempt, choose, setup_transport
from tests.support.configs import smallest_config


@pytest.fixture
def config(tmp_path):
    return lambda *overrides: smallest_config(tmp_path, *overrides)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda *a: 0)


def test_auto_follows_the_device(config):
    assert isinstance(setup_transport(config(), "cuda", None, [0, 1], None), IPCTransport)
    transport = setup_transport(config(), "cpu", None, [0], None)
    assert isinstance(transport, BroadcastTransport) and transport.backend == "gloo"
    assert choose("auto", "cuda", shared_gpu=False) == "nccl"


def test_ipc_wants_the_tensors_on_every_owner(config):
    assert setup_transport(config(), "cuda", None, [0, 2], None).receivers == [0, 2]
    assert setup_transport(config(), "cpu", None, [0, 2], None).receivers == [0]


@pytest.mark.parametrize(
    ("choice", "device", "shared", "words"),
    [
        ("nccl", "cpu", False, "needs GPUs"),
        ("cuda_ipc", "cpu", False, "needs GPUs"),
        ("nccl", "cuda", True, "cannot share a GPU"),
        ("cuda_ipc", "cuda", False, "handles do not reach further"),
    ],
)
def test_impossible_choices_are_refused_with_the_reason(choice, device, shared, words):
    with pytest.raises(ConfigError, match=words):
        choose(choice, device, shared)


@pytest.mark.parametrize(("choice", "shared"), [("nccl", False), ("cuda_ipc", True), ("gloo", True)])
def test_possible_choices_are_taken(choice, shared):
    assert choose(choice, "cuda", shared) == choice


def test_an_engine_error_is_raised_without_waiting_for_the_rest():
    failed, stuck = Future(), Future()
    failed.set_exception(EngineError("scheduler refused"))
    began = time.monotonic()
    with pytest.raises(EngineError, match="bucket 1 of actor-3: scheduler refused"):
        Sending("bucket 1 of actor-3", 30, [stuck, failed]).wait()
    assert time.monotonic() - began < 5


def test_the_time_runs_from_the_start():
    sending = Sending("bucket 2 of actor-3, a to z", 0.2, [Future()])
    time.sleep(0.2)
    with pytest.raises(TransferError, match="bucket 2 of actor-3, a to z: not complete"):
        sending.wait()


def test_what_does_not_even_start_is_raised_where_it_is_waited_for():
    def refuse():
        raise EngineError("the target model has no a")

    sending = attempt(refuse, "bucket 1", 30)
    with pytest.raises(EngineError, match="bucket 1: the target model has no a"):
        sending.wait()
    attempt(list, "bucket 1", 30).wait()
