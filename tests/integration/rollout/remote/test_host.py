"""An engine's host, run by launch/train.py: its error message and exit code when its rank or the store is lost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from respec_trainer.network import free_port
from respec_trainer.rollout.remote.link import close, job_store, reach
from tests.support.tiny_runs import REPOSITORY, tiny_run

APART = ["rollout.placement=disaggregated", "rollout.engine_ranks=1", "rollout.engine.span=1", "actor.parallel.tp=1"]


@pytest.fixture
def host(tmp_path, monkeypatch):
    """(the second rank of two, the job's store). The first rank is this process, without a watchdog."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    command = [sys.executable, str(REPOSITORY / "launch/train.py"), *tiny_run(tmp_path), *APART, "run.lost_after=1"]
    rank_variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | rank_variables)
    yield process, store
    process.kill()
    process.wait()


def check_ends_with(process: subprocess.Popen, words: str) -> None:
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output


def test_it_reports_a_lost_rank(host):
    process, _ = host
    close(reach(job_store(60), 0, 60))
    check_ends_with(process, "error: rank 0, for which this host holds an engine, or the link to it is gone")


@pytest.mark.long
def test_it_does_not_outlive_the_job_s_store(host):
    process, store = host
    job_store(60).queue_pop("respec_hosts_of_engine_0")
    store.clear()
    check_ends_with(process, "so its first rank is not there")
