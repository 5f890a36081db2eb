"""rollout/link.py: the two sides find each other, by a store, and notice when the other is gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.network import free_port
from respec_trainer.rollout.link import hang_up, job_store, offer, reach


@pytest.fixture
def store(monkeypatch):
    """The job's store, as its first rank makes it."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_two_sides_meet_and_part(store):
    with ThreadPoolExecutor() as threads:
        hosts = [threads.submit(offer, job_store(10), engine) for engine in (0, 1)]
        ours = [reach(job_store(10), engine, 10) for engine in (1, 0)]
        theirs = [host.result() for host in hosts]
    ours[0].send({"a": [1, 2]})
    assert theirs[1].recv() == {"a": [1, 2]} and not theirs[0].poll()
    ends = []
    waiting = threading.Thread(target=lambda: ends.append(pytest.raises(EOFError, ours[0].recv)))
    waiting.start()
    hang_up(theirs[1])
    waiting.join(10)
    assert len(ends) == 1, "whoever waits hears of it"
    hang_up(ours[0])
    hang_up(ours[1])
    with pytest.raises(EOFError):
        theirs[0].recv()


def test_strangers_are_refused(store):
    with ThreadPoolExecutor() as threads:
        host = threads.submit(offer, job_store(10), 0)  # a client waits for one answer at a time
        store.wait(["respec_engine_0"])
        address, port, _ = store.get("respec_engine_0").decode().split()
        with pytest.raises(AuthenticationError):
            Client((address, int(port)), authkey=b"guessed")
        with pytest.raises(AuthenticationError):
            host.result()


def test_nobody_there(store, monkeypatch):
    with pytest.raises(EngineError, match="host of engine 3 cannot be reached"):
        reach(store, 3, timeout=0.2)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(EngineError, match="store at 127.0.0.1:.* does not answer"):
        job_store(0.2)
