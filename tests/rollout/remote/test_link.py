"""rollout/remote/link.py: two sides find each other through a store, and detect when the other is gone."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.network import free_port
from respec_trainer.rollout.remote import link
from respec_trainer.rollout.remote.link import HostAbsentError, close, job_store, offer, reach


@pytest.fixture
def store(monkeypatch):
    """The job's store, as its first rank makes it."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_two_sides_connect_and_close(store):
    with ThreadPoolExecutor() as threads:
        hosts = [threads.submit(offer, job_store(10), engine) for engine in (0, 1)]
        ours = [reach(job_store(10), engine, 10) for engine in (1, 0)]
        theirs = [host.result() for host in hosts]
    ours[0].send({"a": [1, 2]})
    assert theirs[1].recv() == {"a": [1, 2]} and not theirs[0].poll()
    ends = []
    waiting = threading.Thread(target=lambda: ends.append(pytest.raises(EOFError, ours[0].recv)))
    waiting.start()
    close(theirs[1])
    waiting.join(10)
    assert len(ends) == 1, "a waiting read fails"
    close(ours[0])
    close(ours[1])
    with pytest.raises(EOFError):
        theirs[0].recv()


def offered(store) -> tuple[str, int]:
    """Take the offer of engine 0's host; return the address at which it listens."""
    address, port, _ = store.queue_pop("respec_hosts_of_engine_0").decode().split()
    return address, int(port)


def test_strangers_do_not_keep_the_host_from_its_rank(store, monkeypatch):
    """A scanner, a guesser and a silent stranger each take the only offer, and the host posts another."""
    monkeypatch.setattr(link, "PROOF_SECONDS", 0.3)
    with ThreadPoolExecutor() as threads:
        host = threads.submit(offer, job_store(10), 0)
        socket.create_connection(offered(store)).close()
        with socket.create_connection(offered(store)) as guesser:
            guesser.sendall(bytes(64))
            assert len(guesser.recv(64)) >= 32, "the host sends a challenge"
            address = offered(store)
            while guesser.recv(64):
                pass  # until the host refuses it
        with socket.create_connection(address):
            ours = reach(job_store(10), 0, 10)
            theirs = host.result(10)
    ours.send("there")
    assert theirs.recv() == "there"


def test_a_rank_does_not_connect_to_strangers(store):
    """A process at an offer's address that sends a challenge back is not the host."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        store.queue_push("respec_hosts_of_engine_0", f"127.0.0.1 {server.getsockname()[1]} {bytes(32).hex()}")
        reaching = threads.submit(reach, job_store(10), 0, 0.5)
        echo, _ = server.accept()
        for _ in range(2):
            echo.sendall(echo.recv(32))
        with pytest.raises(HostAbsentError, match="does not have the key"):
            reaching.result(10)


def test_offers_of_hosts_that_are_gone_are_passed_over(store):
    """Skip a host that died before it was reached and one that died after; wait for the next."""
    store.queue_push("respec_hosts_of_engine_0", f"127.0.0.1 {free_port()} {bytes(32).hex()}")
    with ThreadPoolExecutor() as threads:
        reaching = threads.submit(reach, job_store(10), 0, 10)
        close(offer(job_store(10), 0))
        with pytest.raises(EOFError):
            reaching.result(10).recv()
        again = threads.submit(reach, job_store(10), 0, 10)
        time.sleep(0.2)
        theirs = offer(job_store(10), 0)
        theirs.send("new")
        assert again.result(10).recv() == "new"


def test_a_host_does_not_wait_for_a_job_that_is_gone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    first = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as threads:
        host = threads.submit(offer, job_store(10), 0, 0.1)
        offered(first)
        time.sleep(0.3)
        assert not host.done()
        del first  # this ends the store
        with pytest.raises(EngineError, match="its first rank is not there"):
            host.result(10)


def test_a_missing_host_and_a_missing_store(store, monkeypatch):
    with pytest.raises(HostAbsentError, match="host of engine 3 cannot be reached: none came within 0.2 s"):
        reach(store, 3, timeout=0.2)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(EngineError, match="store at 127.0.0.1:.* does not answer"):
        job_store(0.2)
