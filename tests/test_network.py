"""network.py: ports."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from respec_trainer import network
from respec_trainer.network import FIRST, MOST_HELD, free_port, is_free


@pytest.fixture
def system_takes(monkeypatch, tmp_path):
    """Return a function that sets the first port of the system's own range."""
    monkeypatch.setattr(network, "LINUX_RANGE", tmp_path / "range")
    return lambda first: (tmp_path / "range").write_text(f"{first}\t60999\n")


def test_a_port_in_use_is_not_free():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        assert is_free(server.getsockname()[1]) is False


def test_free_port_is_free():
    assert is_free(free_port())


def test_it_is_held_for_whoever_asked():
    port = free_port()
    assert is_held(port)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert store.port == port and not is_free(port)


def test_it_is_none_that_the_system_may_give_away(system_takes):
    system_takes(FIRST + 100)
    assert {free_port() for _ in range(50)} <= set(range(FIRST, FIRST + 100))


def test_one_that_is_taken_is_passed_over(system_takes, monkeypatch):
    taken = free_port()
    monkeypatch.setattr(network, "FIRST", taken)
    system_takes(taken + 1)
    assert free_port() != taken, "the only one there is"


def is_held(port: int) -> bool:
    """Return whether a second bind without SO_REUSEADDR fails, which is how the function tries ports."""
    with socket.socket() as other:
        try:
            other.bind(("", port))
        except OSError:
            return True
    return False


def test_only_the_latest_are_held():
    ports = [free_port() for _ in range(MOST_HELD + 3)]
    assert [is_held(port) for port in ports] == [False] * 3 + [True] * MOST_HELD


@pytest.mark.parametrize("first", [1024, FIRST])
def test_a_system_that_takes_all_still_has_one(system_takes, first):
    system_takes(first)
    assert is_free(free_port())


def test_a_system_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "LINUX_RANGE", tmp_path / "absent")
    assert FIRST <= free_port() < 49152


def test_a_host_without_a_free_port_says_so(monkeypatch):
    closed = []

    class Refused(socket.socket):
        def bind(self, address):
            raise OSError("address in use")

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(OSError, match="this host has no free TCP port"):
        free_port()
    assert len(closed) > 100, "after many tries, whose sockets are closed"
    assert not is_free(8000)
