"""resync/transport.py: which transport a topology gets, and which are refused."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest

from respec_trainer.errors import ConfigError, EngineError, ResyncError
from respec_trainer.resync.transport import BroadcastTransport, IPCTransport, _wait, setup_transport
from tests.configs import smallest_config


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


def test_ipc_wants_the_tensors_on_every_owner(config):
    assert setup_transport(config(), "cuda", None, [0, 2], None).receivers == [0, 2]
    assert setup_transport(config(), "cpu", None, [0, 2], None).receivers == [0]


@pytest.mark.parametrize(
    ("choice", "device", "words"),
    [("nccl", "cpu", "needs GPUs"), ("cuda_ipc", "cpu", "needs GPUs"), ("nccl", "cuda", "cannot share a GPU")],
)
def test_impossible_choices_are_refused_with_the_reason(config, choice, device, words):
    with pytest.raises(ConfigError, match=words):
        setup_transport(config(f"resync.transport={choice}"), device, None, [0], None)


def test_wait_raises_an_engine_error_without_waiting_for_the_rest():
    failed, stuck = Future(), Future()
    failed.set_exception(EngineError("scheduler refused"))
    began = time.monotonic()
    with pytest.raises(EngineError, match="scheduler refused"):
        _wait([stuck, failed], timeout=30, doing="carrying")
    assert time.monotonic() - began < 5


def test_wait_times_out_saying_what_it_did():
    with pytest.raises(ResyncError, match="carrying 3 tensors: 1 of 1"):
        _wait([Future()], timeout=0.05, doing="carrying 3 tensors")
