"""Other ways to start launch/train.py than `deepspeed --num_gpus 2`: torchrun, or one launcher on each host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from respec_trainer.network import free_port
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.tiny_runs import REPOSITORY, tiny_run


def binary(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def start(launcher: list[str], words: list[str], *options: str) -> subprocess.Popen:
    command = [*launcher, str(REPOSITORY / "launch/train.py"), *words, *options, "run.steps=1"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )


def torchrun() -> list[str]:
    return [binary("torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]


def deepspeed() -> list[str]:
    return [binary("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]


@pytest.mark.long
def test_one_iteration_under_torchrun(tmp_path):
    process = start(torchrun(), tiny_run(tmp_path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(read_metrics(tmp_path / "runs/test")) == 1


@pytest.mark.parametrize("launcher", [deepspeed, pytest.param(torchrun, marks=pytest.mark.long)])
def test_check_is_printed_once(launcher, tmp_path):
    process = start(launcher(), tiny_run(tmp_path), "--check")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("1 x 2 ranks without a GPU, colocated: tp 2 x dp 1") == 1
    assert output.count("no problem found") == 1 and not (tmp_path / "runs/test").exists()


@pytest.mark.long
def test_two_launchers_without_ssh_make_one_run(tmp_path):
    """Both launchers run on one host, which needs no privileges; test_hosts.py uses two hosts."""
    hosts, words = tmp_path / "hostfile", tiny_run(tmp_path)
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    port = str(free_port())
    launcher = [binary("deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", port, "--node_rank"]
    processes = [start([*launcher, number], words) for number in "01"]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert len(read_metrics(tmp_path / "runs/test")) == 1
