"""Ports of this host."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LINUX_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 15000  # ports below are more often some service's own
TRIES = 200
_draw = random.SystemRandom()  # a seeded generator would give the same port to every process of a job


def free_port() -> int:
    """A TCP port that nothing on this host listens on now, outside the range that the system itself takes ports from.

    A port of that range may go to any connection in the time until the caller listens on it, and the caller often is
    another process that has yet to start.
    """
    ports = range(FIRST, _first_of_system())
    for port in (_draw.choice(ports) for _ in range(TRIES) if ports):
        if is_free(port):
            return port
    with socket.socket() as probe:  # no room there: any that is free
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_free(port: int, address: str = "") -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _first_of_system() -> int:
    """The first port that the system gives to connections; IANA's where it does not say (RFC 6335, section 6)."""
    try:
        return int(LINUX_RANGE.read_text().split()[0])
    except OSError:
        return 49152
