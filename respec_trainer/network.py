"""Ports of this host."""

from __future__ import annotations

import random
import socket
from collections import deque
from pathlib import Path

LINUX_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 15000  # lower ports are more often used by other services
TRIES = 200
MOST_HELD = 64
_draw = random.SystemRandom()  # a seeded generator would give the same port to every process of a job
_held: deque[socket.socket] = deque()


def free_port() -> int:
    """Return a TCP port for a server that starts later, and reserve it until then.

    The port lies outside the range from which the system takes ports for connections. A socket of this process that
    does not listen keeps it bound until this process ends or has reserved MOST_HELD more ports. So no other caller on
    this host gets the port, but a server that sets SO_REUSEADDR, as servers do, can listen on it.

    Raises OSError if the host has no free port.
    """
    ports = range(FIRST, _first_of_system())
    for port in (*(_draw.choice(ports) for _ in range(TRIES) if ports), 0):  # 0: any port, if all tries fail
        holder = socket.socket()
        try:
            holder.bind(("", port))
        except OSError:
            holder.close()
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _held.append(holder)
        if len(_held) > MOST_HELD:
            _held.popleft().close()
        return holder.getsockname()[1]
    raise OSError("this host has no free TCP port")


def is_free(port: int) -> bool:
    """Return whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _first_of_system() -> int:
    """The first port that the system uses for connections; if unknown, IANA's (RFC 6335, section 6)."""
    try:
        return int(LINUX_RANGE.read_text().split()[0])
    except OSError:
        return 49152
