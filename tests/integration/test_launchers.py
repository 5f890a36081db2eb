"""Other ways to start launch/train.py than `deepspeed --num_gpus 2`: torchrun, and one launcher a host without ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from respec_trainer.network import free_port
from respec_trainer.telemetry.recorder import read_metrics

REPOSITORY = Path(__file__).parents[2]
SHORT = ["run.steps=1", "data.prompts_per_step=4", "rollout.sampling.max_new_tokens=8", "speculation.algorithm=none"]


def binary(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def start(launcher: list[str], actor: Path, folder: Path, *options: str) -> subprocess.Popen:
    command = [*launcher, str(REPOSITORY / "launch/train.py"), "--config", str(REPOSITORY / "configs/quickstart.yaml")]
    command += [*options, f"model.path={actor}", f"data.path={actor}/data/train.jsonl", f"run.dir={folder}"]
    command += ["run.name=test", "run.device=cpu", "drafter.path=null", "telemetry.live=lines", *SHORT]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )


def torchrun() -> list[str]:
    return [binary("torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]


def test_one_iteration_under_torchrun(small_actor, tmp_path):
    process = start(torchrun(), small_actor, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(read_metrics(tmp_path / "test")) == 1


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_check_is_printed_once(name, small_actor, tmp_path):
    deepspeed = [binary("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    process = start(torchrun() if name == "torchrun" else deepspeed, small_actor, tmp_path, "--check")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("1 x 2 ranks without a GPU, colocated: tp 2 x dp 1") == 1
    assert output.count("no problem found") == 1 and not (tmp_path / "test").exists()


def test_two_launchers_without_ssh_make_one_run(small_actor, tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    port = str(free_port())
    launcher = [binary("deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", port, "--node_rank"]
    processes = [start([*launcher, number], small_actor, tmp_path) for number in "01"]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert len(read_metrics(tmp_path / "test")) == 1
