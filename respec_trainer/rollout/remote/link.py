"""Link: the connection between an engine's host and the training rank that speaks for the engine.

They find each other through the store at which the job's ranks meet: a host offers itself there, in a queue, and the
rank takes the next offer, at the start and whenever a host was lost. Over the connection go pickled messages; both
sides first prove that they know a key that only the store tells.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import torch.distributed as dist

from respec_trainer.errors import EngineError, EngineLostError

# A host that vanished without a word, as when its power or its cable fails, is missed after 40 seconds: it is asked
# whether it is there after 15 of silence, then every 5, five times; and what was sent may be unconfirmed for 40000 ms.
WATCH = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 5,
    socket.TCP_USER_TIMEOUT: 40_000,
}
PROOF_BYTES = 32
PROOF_SECONDS = 10.0  # that the other side may take for the next step of its proof
STORE_SECONDS = 2.0  # between two looks whether the store is there


class HostAbsentError(EngineLostError):
    """No host came for an engine in time: to start the engine again would not help."""


class LinkLostError(EngineError):
    """The rank that speaks for an engine is gone without a word; who is to blame, others know better."""


def job_store(timeout: float) -> dist.Store:
    """A client of the store at MASTER_ADDR:MASTER_PORT, as launchers set them.

    Raises EngineError if nothing answers there for `timeout` seconds.
    """
    limit = timedelta(seconds=timeout)
    try:
        return dist.TCPStore(*store_address(), is_master=False, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise _no_answer(error) from error


def offer(store: dist.Store, engine: int, look: float = STORE_SECONDS) -> Connection:
    """Wait for the rank that speaks for engine number `engine`, and return the connection to it.

    It is waited for as long as the store answers, at which one looks every `look` seconds; whoever else connects, as a
    scanner of ports does, is turned away. Raises EngineError when the store is gone.
    """
    key = secrets.token_bytes(PROOF_BYTES)
    with socket.create_server((_own_address(), 0)) as server:
        server.settimeout(look)
        address, port = server.getsockname()
        name, words = _name(engine), f"{address} {port} {key.hex()}"
        _tell(store, name, words)
        while True:
            with contextlib.suppress(TimeoutError):
                caller, _ = server.accept()
                with contextlib.suppress(OSError):
                    return _connection(caller, key, b"host", b"trainer")
                _tell(store, name, words)  # perhaps it was the one that is waited for, and the offer is taken
            _look(store, name)


def reach(store: dist.Store, engine: int, timeout: float) -> Connection:
    """The connection to the next host that offers itself for engine number `engine`.

    Every offer is taken once; one that a host has left that is gone since is passed over. Raises HostAbsentError if
    none leads to a host in `timeout` seconds, EngineError if the store is gone.
    """
    deadline, tried = time.monotonic() + timeout, ""
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        store.set_timeout(timedelta(seconds=left))
        try:
            address, port, key = store.queue_pop(_name(engine)).decode().split()
        except dist.DistStoreError:
            raise HostAbsentError(
                f"the host of engine {engine} cannot be reached: none came within {timeout:g} s "
                f"(rollout.engine.timeout){tried}"
            ) from None
        except RuntimeError as error:
            raise _no_answer(error) from error
        try:
            caller = socket.create_connection((address, int(port)), timeout=min(left, PROOF_SECONDS))
            return _connection(caller, bytes.fromhex(key), b"trainer", b"host")
        except OSError as error:
            tried = f"; one was offered at {address}:{port}: {error}"


def cut(connection: Connection) -> None:
    """End it, but keep it: whoever waits on it, to read or to write, hears of it, on either side."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def hang_up(connection: Connection) -> None:
    """Close it; a thread that waits for a message of it gets an EOFError, on either side."""
    cut(connection)
    connection.close()


def _connection(caller: socket.socket, key: bytes, ours: bytes, theirs: bytes) -> Connection:
    """What has become of a socket whose other end has proved that it knows the key. Raises OSError if it has not."""
    try:
        caller.settimeout(PROOF_SECONDS)
        _prove(caller, key, ours, theirs)
        caller.settimeout(None)
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # most messages are small, and waited for
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in WATCH.items():
            caller.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        caller.close()
        raise
    return Connection(caller.detach())


def _prove(caller: socket.socket, key: bytes, ours: bytes, theirs: bytes) -> None:
    """Each side answers the other's challenge; an answer names its side, so that none can be given back."""
    challenge = secrets.token_bytes(PROOF_BYTES)
    caller.sendall(challenge)
    caller.sendall(hmac.digest(key, ours + _read(caller), "sha256"))
    if not hmac.compare_digest(_read(caller), hmac.digest(key, theirs + challenge, "sha256")):
        raise ConnectionError("the other side does not know the key")


def _read(caller: socket.socket) -> bytes:
    data = b""
    while len(data) < PROOF_BYTES:
        more = caller.recv(PROOF_BYTES - len(data))
        if not more:
            raise ConnectionError("the other side has hung up")
        data += more
    return data


def _tell(store: dist.Store, name: str, words: str) -> None:
    try:
        store.queue_push(name, words)
    except RuntimeError as error:
        raise _no_answer(error) from error


def _look(store: dist.Store, name: str) -> None:
    try:
        store.queue_len(name)
    except RuntimeError as error:
        raise _no_answer(error) from error


def _no_answer(error: RuntimeError) -> EngineError:
    address, port = store_address()
    first = str(error).partition("\n")[0]
    return EngineError(f"the job's store at {address}:{port} does not answer, so its first rank is not there: {first}")


def store_address() -> tuple[str, int]:
    """(host, port) at which the job's ranks meet, as launchers set them."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _own_address() -> str:
    """The address of this machine in the network in which it reaches the job's first rank."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(store_address())  # sends nothing
        return probe.getsockname()[0]


def _name(engine: int) -> str:
    return f"respec_hosts_of_engine_{engine}"
