"""Checks that all hosts of a run are alike, before training: versions, code, GPUs, ranks, the run's folder."""

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
FOLDER_SECONDS = 20.0  # time that a network file system may take to show a new file
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class HostFacts:
    """The facts about the host of one rank. All but `host` must be the same on all hosts with training ranks."""

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
    """Raise ConfigError on every rank if the hosts of `control`'s ranks differ; the message lists all differences.

    Every rank calls it. `facts` are those of this rank's host; None: look them up.
    """
    problems = differences(gather(facts or HostFacts.here(), control))
    if problems:
        raise ConfigError(
            "the hosts of this run are not alike:\n" + "\n".join(f"  {text}" for text in problems) + "\n"
            "install the same versions and code, and give the same number of GPUs, on all of them"
        )


def differences(facts_of_ranks: Sequence[HostFacts]) -> list[str]:
    """Return one line for each fact that is not the same on all ranks: the values, with their ranks and hosts."""
    lines = []
    for name, values in _columns(facts_of_ranks).items():
        if len(set(values)) > 1:
            shares = [f"{value} on {_where(facts_of_ranks, values, value)}" for value in dict.fromkeys(values)]
            lines.append(f"{name}: {', '.join(shares)}")
    return lines


def engine_host_differences(trainer: HostFacts, host: HostFacts) -> list[str]:
    """Return one line for each difference between a host that only holds engines and one that trains.

    The numbers of GPUs and ranks may differ.
    """
    columns = _columns([trainer, host])
    return [
        f"{name}: {ours} on {trainer.host}, which trains, {theirs} on {host.host}"
        for name, (ours, theirs) in columns.items()
        if ours != theirs and name not in (NAMES["gpus"], NAMES["ranks"])
    ]


def check_shared_folder(folder: Path, control: dist.ProcessGroup | None, seconds: float = FOLDER_SECONDS) -> None:
    """Raise ConfigError on every rank unless all of them see a file that rank 0 writes in `folder` within `seconds`.

    Every rank calls it, each with its own path to the folder. Rank 0 makes the folder if it is missing.
    """
    token = from_first(lambda: _write_token(folder), control)
    answers = gather((socket.gethostname(), _appears(folder / f".{token}", seconds)), control)
    if dist.get_rank(control) == 0:
        (folder / f".{token}").unlink(missing_ok=True)
    blind = [f"rank {number} on {host}" for number, (host, saw) in enumerate(answers) if not saw]
    if blind:
        raise ConfigError(
            f"run.dir: {folder.absolute()} is not one folder for all ranks: what rank 0 on {answers[0][0]} wrote there "
            f"did not appear to {', '.join(blind)} within {seconds:.0f} s; set run.dir to a folder that all hosts share"
        )


def code_digest(folder: Path = Path(__file__).parent) -> str:
    """Return the digest of the names and contents of all Python files under `folder`."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _columns(facts_of_ranks: Sequence[HostFacts]) -> dict[str, list]:
    """Return the values of all ranks for each fact that is compared."""
    columns = {}
    for field in fields(HostFacts):
        if field.name == "libraries":
            columns |= {name: [dict(facts.libraries).get(name) for facts in facts_of_ranks] for name in LIBRARIES}
        elif field.name != "host":
            columns[NAMES.get(field.name, field.name)] = [getattr(facts, field.name) for facts in facts_of_ranks]
    return columns


def _where(facts_of_ranks: Sequence[HostFacts], values: list, value) -> str:
    """Return the hosts and ranks that have `value`, as text."""
    hosts: dict[str, list[str]] = {}
    for rank, facts in enumerate(facts_of_ranks):
        if values[rank] == value:
            hosts.setdefault(facts.host, []).append(str(rank))
    parts = [f"{host} (rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)})" for host, ranks in hosts.items()]
    return " and ".join(parts)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _write_token(folder: Path) -> str:
    """Write an empty file .TOKEN, with a random name, into the folder; return TOKEN."""
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
