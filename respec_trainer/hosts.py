"""What hosts must have in common, compared before training starts: versions, code, GPUs, ranks, the run's folder."""

from __future__ import annotations

import platform
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from respec_trainer.collectives import from_first, gather
from respec_trainer.errors import ConfigError
from respec_trainer.processes import local_size

LIBRARIES = ("torch", "sglang", "transformers", "deepspeed", "megatron-core")
NAMES = {"code": "respec_trainer's files (digest)", "gpus": "GPUs seen", "ranks": "ranks of a host"}  # in messages
FOLDER_SECONDS = 20.0  # that a network file system may take to show a new file
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class HostFacts:
    """Of the host of one rank. All but `host` must be the same wherever ranks train."""

    host: str
    python: str
    libraries: tuple[tuple[str, str], ...]  # name, version
    code: str  # digest of this package's files
    gpus: int
    ranks: int

    @classmethod
    def here(cls) -> HostFacts:
        return cls(
            host=socket.gethostname(),
            python=platform.python_version(),
            libraries=tuple((name, _version(name)) for name in LIBRARIES),
            code=code_digest(),
            gpus=torch.cuda.device_count(),
            ranks=local_size(),
        )


def check_hosts(control: dist.ProcessGroup | None, facts: HostFacts | None = None) -> None:
    """Raise ConfigError on every rank, naming all that differs between the hosts of `control`'s ranks.

    Every rank calls it. `facts` are this rank's; None: looked up.
    """
    problems = differences(gather(facts or HostFacts.here(), control))
    if problems:
        raise ConfigError(
            "the hosts of this run are not alike:\n" + "\n".join(f"  {text}" for text in problems) + "\n"
            "install the same versions and code, and give the same number of GPUs, on all of them"
        )


def differences(told: Sequence[HostFacts]) -> list[str]:
    """What is not the same everywhere, a line each: which ranks, on which hosts, have what."""
    lines = []
    for name, values in _columns(told).items():
        if len(set(values)) > 1:
            shares = [f"{value} on {_where(told, values, value)}" for value in dict.fromkeys(values)]
            lines.append(f"{name}: {', '.join(shares)}")
    return lines


def engine_host_differences(trainer: HostFacts, host: HostFacts) -> list[str]:
    """What a host that only holds engines has not in common with those that train, a line each.

    How many GPUs and ranks it has is its own affair.
    """
    columns = _columns([trainer, host])
    return [
        f"{name}: {ours} on {trainer.host}, which trains, {theirs} on {host.host}"
        for name, (ours, theirs) in columns.items()
        if ours != theirs and name not in (NAMES["gpus"], NAMES["ranks"])
    ]


def check_shared_folder(folder: Path, control: dist.ProcessGroup | None, seconds: float = FOLDER_SECONDS) -> None:
    """Raise ConfigError on every rank unless all of them read in `folder` what rank 0 writes there, within `seconds`.

    Every rank calls it, each with its own path to the folder; rank 0 makes it if it is missing.
    """
    token = from_first(lambda: _leave_token(folder), control)
    told = gather((socket.gethostname(), _appears(folder / f".{token}", seconds)), control)
    if dist.get_rank(control) == 0:
        (folder / f".{token}").unlink(missing_ok=True)
    blind = [f"rank {number} on {host}" for number, (host, saw) in enumerate(told) if not saw]
    if blind:
        raise ConfigError(
            f"run.dir: {folder.absolute()} is not one folder for all ranks: what rank 0 on {told[0][0]} wrote there "
            f"did not appear to {', '.join(blind)} within {seconds:.0f} s; set run.dir to a folder that all hosts share"
        )


def code_digest(folder: Path = Path(__file__).parent) -> str:
    """Of every Python file under `folder`: names and contents."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _columns(told: Sequence[HostFacts]) -> dict[str, list]:
    """By what is compared, every rank's value."""
    columns = {}
    for field in fields(HostFacts):
        if field.name == "libraries":
            columns |= {name: [dict(facts.libraries).get(name) for facts in told] for name in LIBRARIES}
        elif field.name != "host":
            columns[NAMES.get(field.name, field.name)] = [getattr(facts, field.name) for facts in told]
    return columns


def _where(told: Sequence[HostFacts], values: list, value) -> str:
    """The hosts of the ranks that have `value`, with the ranks."""
    hosts: dict[str, list[str]] = {}
    for rank, facts in enumerate(told):
        if values[rank] == value:
            hosts.setdefault(facts.host, []).append(str(rank))
    parts = [f"{host} (rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)})" for host, ranks in hosts.items()]
    return " and ".join(parts)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _leave_token(folder: Path) -> str:
    """Leave a file .TOKEN in the folder; returns the token, a random one."""
    token = uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{token}").touch()
    except OSError as error:
        raise ConfigError(f"run.dir: rank 0 cannot write in {folder.absolute()}: {error}") from error
    return token


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
