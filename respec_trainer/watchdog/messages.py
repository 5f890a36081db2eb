"""What ranks and the judge tell each other: small JSON datagrams."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

MOST_BYTES = 60_000  # of a datagram, below UDP's 65 507
MOST_CHARACTERS = 9_000  # of the longest text in one, of whose size the others are a part

# running; broken: lost contact in a collective, so that somebody else is to blame; ended: by a signal; failed: by an
# error of its own; done: finished as it should
State = Literal["running", "broken", "ended", "failed", "done"]


@dataclass(frozen=True)
class Process:
    """A process told from all others: `pid` counts in `home`, a machine's boot and a PID namespace."""

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
        """The process, if it is of this machine and still there; one that has ended and waits for its parent is not."""
        try:
            found = psutil.Process(self.pid)
            alive = found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - self.born) < 1.0
        except psutil.NoSuchProcess:
            return None
        return found if alive else None


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    rank: int
    process: Process
    state: State
    step: int  # under way, from 1
    phase: str
    moves: int  # phases entered since the start: the same on all ranks, because all run the same loop
    still: float  # seconds since the last of them
    note: str = ""  # what it failed of
    stack: str = ""  # of its main thread, where the judge asked for it
    waits: bool = False  # whether that stack is inside a collective

    @property
    def place(self) -> str:
        return f"phase {self.phase!r} of step {self.step}"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. `lost` are processes that may still be there, stopped or stuck, and are to be killed."""

    text: str
    lost: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The judge's answer to a beat: its own beat, and what it wants."""

    judge: Beat
    stack: bool = False
    verdict: Verdict | None = None


def encode(message: Beat | Answer) -> bytes:
    data = json.dumps(asdict(message), ensure_ascii=False).encode(errors="replace")
    if len(data) > MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes does not fit a datagram")
    return data


def decode_beat(data: bytes) -> Beat:
    """Raises ValueError, KeyError or TypeError for what is none."""
    return _beat(json.loads(data))


def decode_answer(data: bytes) -> Answer:
    """Raises ValueError, KeyError or TypeError for what is none."""
    tree = json.loads(data)
    verdict = tree["verdict"] and Verdict(
        tree["verdict"]["text"], tuple(Process(**process) for process in tree["verdict"]["lost"])
    )
    return Answer(_beat(tree["judge"]), tree["stack"], verdict)


def _beat(tree: dict[str, Any]) -> Beat:
    return Beat(**(tree | {"process": Process(**tree["process"])}))
