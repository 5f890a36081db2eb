"""Link: the connection between an engine's host and the training rank that owns the engine.

They find each other through the job's store: a host posts an offer in a queue there, and the owner takes the next
offer, at the start and whenever it has lost a host. The connection carries pickled messages; both sides first prove
that they have the key that was posted in the store.
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

# A host that disappears without closing the connection, for example by a power or cable failure, is detected after 40
# seconds: the kernel probes it after 15 seconds of silence, then every 5 seconds, five times; and sent data may stay
# unacknowledged for 40000 ms.
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 5,
    socket.TCP_USER_TIMEOUT: 40_000,
}
PROOF_BYTES = 32
PROOF_SECONDS = 10.0  # time limit for each message of the other side's proof
STORE_SECONDS = 2.0  # between two checks that the store answers


class HostAbsentError(EngineLostError):
    """No host offered itself for an engine in time; starting the engine again would not help."""


class LinkLostError(EngineError):
    """The connection to the rank that owns an engine ended without a dismissal; the cause is on that rank's side."""


def job_store(timeout: float) -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT, as launchers set them.

    Raises EngineError if it does not answer within `timeout` seconds.
    """
    limit = timedelta(seconds=timeout)
    try:
        return dist.TCPStore(*store_address(), is_master=False, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise _no_answer(error) from error


def offer(store: dist.Store, engine: int, interval: float = STORE_SECONDS) -> Connection:
    """Post an offer for engine number `engine`, and return the connection to the rank that takes it.

    Wait as long as the store answers, which is checked every `interval` seconds. Refuse other connections, for example
    of port scanners. Raises EngineError when the store is gone.
    """
    key = secrets.token_bytes(PROOF_BYTES)
    with socket.create_server((_own_address(), 0)) as server:
        server.settimeout(interval)
        address, port = server.getsockname()
        name, text = _name(engine), f"{address} {port} {key.hex()}"
        _post(store, name, text)
        while True:
            with contextlib.suppress(TimeoutError):
                caller, _ = server.accept()
                with contextlib.suppress(OSError):
                    return _connection(caller, key, b"host", b"trainer")
                _post(store, name, text)  # the owner may have taken the offer, and then failed to connect
            _check_store(store, name)


def reach(store: dist.Store, engine: int, timeout: float) -> Connection:
    """Return the connection to the next host that offers itself for engine number `engine`.

    Every offer is taken once; offers of hosts that are gone are skipped. Raises HostAbsentError if no offer leads to a
    host within `timeout` seconds, EngineError if the store is gone.
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
    """Shut the connection down without closing it: every pending read and write fails, on both sides."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def close(connection: Connection) -> None:
    """Close the connection; a thread that waits for a message gets an EOFError, on both sides."""
    cut(connection)
    connection.close()


def _connection(caller: socket.socket, key: bytes, ours: bytes, theirs: bytes) -> Connection:
    """Make a Connection of a socket whose other end proves that it has the key. Raises OSError if it does not."""
    try:
        caller.settimeout(PROOF_SECONDS)
        _prove(caller, key, ours, theirs)
        caller.settimeout(None)
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # most messages are small and urgent
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            caller.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        caller.close()
        raise
    return Connection(caller.detach())


def _prove(caller: socket.socket, key: bytes, ours: bytes, theirs: bytes) -> None:
    """Answer the other side's challenge and check its answer; each names its side, so that none can be sent back."""
    challenge = secrets.token_bytes(PROOF_BYTES)
    caller.sendall(challenge)
    caller.sendall(hmac.digest(key, ours + _read(caller), "sha256"))
    if not hmac.compare_digest(_read(caller), hmac.digest(key, theirs + challenge, "sha256")):
        raise ConnectionError("the other side does not have the key")


def _read(caller: socket.socket) -> bytes:
    data = b""
    while len(data) < PROOF_BYTES:
        more = caller.recv(PROOF_BYTES - len(data))
        if not more:
            raise ConnectionError("the other side closed the connection")
        data += more
    return data


def _post(store: dist.Store, name: str, text: str) -> None:
    try:
        store.queue_push(name, text)
    except RuntimeError as error:
        raise _no_answer(error) from error


def _check_store(store: dist.Store, name: str) -> None:
    try:
        store.queue_len(name)
    except RuntimeError as error:
        raise _no_answer(error) from error


def _no_answer(error: RuntimeError) -> EngineError:
    address, port = store_address()
    first = str(error).partition("\n")[0]
    return EngineError(f"the job's store at {address}:{port} does not answer, so its first rank is not there: {first}")


def store_address() -> tuple[str, int]:
    """Return (host, port) of the job's store, as launchers set them."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _own_address() -> str:
    """Return this machine's address in the network that leads to the job's first rank."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(store_address())  # sends nothing
        return probe.getsockname()[0]


def _name(engine: int) -> str:
    return f"respec_hosts_of_engine_{engine}"
