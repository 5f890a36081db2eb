"""A real run under launch/supervise.py: its first rank, which owns the engine and watches the others, is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from respec_trainer.network import free_port
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.tiny_runs import REPOSITORY, tiny_run, wait_for

STEPS = 6  # enough that the first rank is killed before they are done


def rank_process(process: subprocess.Popen, rank: int) -> psutil.Process:
    """Return the trainer's process of that rank."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if "launch/train.py" in " ".join(child.cmdline()) and child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.long
def test_a_run_whose_first_rank_is_killed_goes_on_from_its_checkpoint(tmp_path):
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command = [sys.executable, str(REPOSITORY / "launch/supervise.py"), "--backoff", "0.1", "--", *launcher]
    command += ["--master_port", str(free_port()), str(REPOSITORY / "launch/train.py"), *tiny_run(tmp_path)]
    command += [f"run.steps={STEPS}", "telemetry.live=lines", "checkpoint.every=1", "checkpoint.background=false"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        wait_for(tmp_path / "runs/test/checkpoints/latest", process)
        launcher = psutil.Process(process.pid).children()[0]
        family = [launcher, *launcher.children(recursive=True)]
        victim = rank_process(process, 0)
        victim.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, f"still there after a rank was killed: {alive}"
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    assert process.returncode == 0, output
    assert re.search(rf"error: rank 0 on \S+ \(process {victim.pid}\) has ended without a message, in phase", output), (
        output
    )
    assert output.count("error: ") == 1 and "restart 1 of 3" in output and "resumed after step" in output
    assert [step["step"] for step in read_metrics(tmp_path / "runs/test")] == list(range(STEPS))
