"""respec_trainer/hosts.py: hosts that differ, and folders that are not shared, are named on every rank."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from respec_trainer.errors import ConfigError
from respec_trainer.hosts import LIBRARIES, HostFacts, check_hosts, check_shared_folder
from tests.support.processes.ranks import run_ranks

LIBRARY_VERSIONS = tuple((name, "1.0") for name in LIBRARIES)
NODE0 = HostFacts("node0", "3.11.7", LIBRARY_VERSIONS, "abc", 8, 8)
OLD_TORCH = (("torch", "0.9"), *LIBRARY_VERSIONS[1:])


def message_of(check, *arguments) -> str | None:
    dist.init_process_group("gloo")
    try:
        check(*arguments)
    except ConfigError as error:
        return str(error)
    return None


def compare(others: list[HostFacts]) -> str | None:
    return message_of(lambda: check_hosts(None, others[int(os.environ["RANK"])]))


def share(folders: list[Path]) -> str | None:
    return message_of(lambda: check_shared_folder(folders[int(os.environ["RANK"])], None, 0.5))


def look_here() -> str | None:
    return message_of(lambda: check_hosts(None))


def test_ranks_of_one_host_are_alike():
    assert run_ranks(2, look_here) == [None, None]


def test_every_difference_is_named_on_every_rank():
    other = replace(NODE0, host="node1", libraries=OLD_TORCH, gpus=4, code="xyz")
    first, second = run_ranks(2, compare, [NODE0, other])
    assert first == second
    assert "torch: 1.0 on node0 (rank 0), 0.9 on node1 (rank 1)" in first
    assert "GPUs seen: 8 on node0 (rank 0), 4 on node1 (rank 1)" in first
    assert "respec_trainer's files (digest): abc" in first and "sglang" not in first


def test_a_shared_folder(tmp_path):
    assert run_ranks(2, share, [tmp_path / "runs"] * 2) == [None, None]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_of_each_host_is_not_shared(tmp_path):
    (tmp_path / "second").mkdir()
    errors = run_ranks(2, share, [tmp_path / "first", tmp_path / "second"])
    for error in errors:
        assert "is not one folder for all ranks" in error and "rank 1 on" in error and "rank 0 on" in error
    assert list((tmp_path / "first").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for error in run_ranks(2, share, [tmp_path / "file/runs"] * 2):
        assert "rank 0 cannot write in" in error
