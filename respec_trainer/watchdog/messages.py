"""The messages between ranks and the judge: small JSON datagrams."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

MOST_BYTES = 60_000  # in a datagram, below UDP's 65 507
MOST_CHARACTERS = 9_000  # in the longest text of a datagram; other texts are limited to a part of it

# broken: lost contact in a collective, so another rank is the cause; ended: by a signal; failed: by its own error;
# done: completed
State = Literal["running", "broken", "ended", "failed", "done"]


@dataclass(frozen=True)
class Process:
    """The identity of a process: `pid` is valid in `home`, which names a machine's boot and a PID namespace."""

    host: str
    home: str
    pid: int
    born: float  # seconds since the epoch, by the host's clock

    @classmethod
    def this(cls) -> Process:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        home = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        return cls(socket.gethostname(), home, os.getpid(), psutil.Process().create_time())

    def here(self) -> psutil.Process | None:
        """Return the process if it runs in this home; None if it has ended, also as a zombie."""
        try:
            found = psutil.Process(self.pid)
            alive = found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - self.born) < 1.0
        except psutil.NoSuchProcess:
            return None
        return found if alive else None


@dataclass(frozen=True)
class Beat:
    """A message that a rank sends every second."""

    rank: int
    process: Process
    state: State
    step: int  # the current one, from 1
    phase: str
    moves: int  # phases entered since the start: the same on all ranks, because all run the same loop
    still: float  # seconds since the last phase was entered
    note: str = ""  # the error or the signal that ended the rank
    stack: str = ""  # of its main thread, if the judge requested it
    waits: bool = False  # whether the main thread is inside a collective

    @property
    def place(self) -> str:
        return f"phase {self.phase!r} of step {self.step}"


@dataclass(frozen=True)
class Verdict:
    """The reason for the end of the run. `lost` are processes that may still exist, stopped or stuck, to be killed."""

    text: str
    lost: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The judge's answer to a beat."""

    judge: Beat  # the beat of the first rank
    stack: bool = False  # whether the judge requests stacks
    verdict: Verdict | None = None


def encode(message: Beat | Answer) -> bytes:
    data = json.dumps(asdict(message), ensure_ascii=False).encode(errors="replace")
    if len(data) > MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes does not fit a datagram")
    return data


def decode_beat(data: bytes) -> Beat:
    """Return the beat in `data`. Raises ValueError, KeyError or TypeError for other data."""
    return _beat(json.loads(data))


def decode_answer(data: bytes) -> Answer:
    """Return the answer in `data`. Raises ValueError, KeyError or TypeError for other data."""
    tree = json.loads(data)
    verdict = tree["verdict"] and Verdict(
        tree["verdict"]["text"], tuple(Process(**process) for process in tree["verdict"]["lost"])
    )
    return Answer(_beat(tree["judge"]), tree["stack"], verdict)


def _beat(tree: dict[str, Any]) -> Beat:
    return Beat(**(tree | {"process": Process(**tree["process"])}))
