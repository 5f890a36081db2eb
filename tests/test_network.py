"""network.py: ports."""

from __future__ import annotations

import socket

from respec_trainer.network import free_port, is_free


def test_a_port_in_use_is_not_free():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        assert not is_free(server.getsockname()[1])


def test_free_port_is_free():
    assert is_free(free_port())
