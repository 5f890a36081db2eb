"""Link: the connection between an engine's host and the training rank that speaks for the engine.

They find each other through the store at which the job's ranks meet. Over the connection go pickled messages; both
sides first prove that they know a key that only the store tells.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener

import torch.distributed as dist

from respec_trainer.errors import EngineError

# A host that vanished without a word, as when its power or its cable fails, is missed after 40 seconds: it is asked
# whether it is there after 15 of silence, then every 5, five times; and what was sent may be unconfirmed for 40000 ms.
WATCH = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 5,
    socket.TCP_USER_TIMEOUT: 40_000,
}


def job_store(timeout: float) -> dist.Store:
    """A client of the store at MASTER_ADDR:MASTER_PORT, as launchers set them.

    Raises EngineError if nothing answers there for `timeout` seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout)
    try:
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise EngineError(f"the job's store at {address}:{port} does not answer: {error}") from error


def offer(store: dist.Store, engine: int) -> Connection:
    """Wait for the rank that speaks for engine number `engine`, and return the connection to it."""
    key = secrets.token_bytes(32)
    with Listener((_own_address(), 0), authkey=key) as listener:
        address, port = listener.address
        store.set(_name(engine), f"{address} {port} {key.hex()}")
        connection = listener.accept()
    _settle(connection)
    return connection


def reach(store: dist.Store, engine: int, timeout: float) -> Connection:
    """The connection to the host of engine number `engine`. Raises EngineError if it does not come in `timeout` s."""
    try:
        store.wait([_name(engine)], timedelta(seconds=timeout))
        address, port, key = store.get(_name(engine)).decode().split()
        connection = Client((address, int(port)), authkey=bytes.fromhex(key))
    except (RuntimeError, OSError) as error:
        raise EngineError(f"the host of engine {engine} cannot be reached: {error}") from error
    _settle(connection)
    return connection


def hang_up(connection: Connection) -> None:
    """Close it; a thread that waits for a message of it gets an EOFError, on either side."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)
    connection.close()


def _settle(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:  # the same socket: what is set on it stays
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # most messages are small, and waited for
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in WATCH.items():
            ours.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_address() -> str:
    """The address of this machine in the network in which it reaches the job's first rank."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        return probe.getsockname()[0]


def _name(engine: int) -> str:
    return f"respec_engine_{engine}"
