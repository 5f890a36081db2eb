"""Runs over two hosts with a cable: the same numbers as on one host, and an end on both if one is cut off or dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from respec_trainer.checkpoint.meta import check_files
from respec_trainer.checkpoint.store import checkpoints_in
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.processes.hosts import Host, missing, two_hosts
from tests.support.tiny_runs import REPOSITORY, numbers, tiny_run

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
TRAIN = str(REPOSITORY / "launch/train.py")
PORT = "29500"  # nothing else runs on these hosts
LOST_AFTER = 12  # seconds; longer than a busy machine may delay a thread
CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def start_on_both(hosts, folder: Path, words: list[str]) -> list[subprocess.Popen]:
    """Start one launcher on each host, as on a cluster without ssh."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    return [start_on(index, hosts, folder, words) for index in range(len(hosts))]


def start_on(index: int, hosts, folder: Path, words: list[str]) -> subprocess.Popen:
    where = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", hosts[0].address]
    where += ["--master_port", PORT, "--node_rank", str(index)]
    return hosts[index].start([DEEPSPEED, *where, TRAIN, *words], folder / f"{hosts[index].name}.log", **CPU)


def logs(hosts, folder: Path) -> str:
    return "".join(f"--- {host.name}\n{(folder / f'{host.name}.log').read_text()}" for host in hosts)


@pytest.mark.parametrize("tp", [1, 2])
def test_two_hosts_compute_what_one_does_bit_for_bit(hosts, tmp_path, tp):
    shape = [f"actor.parallel.tp={tp}", "rollout.engine.span=1", "run.steps=2", "checkpoint.every=2"]
    words = [*tiny_run(tmp_path), *shape]
    for process in start_on_both(hosts, tmp_path, [*words, "run.name=two"]):
        assert process.wait(timeout=300) == 0, logs(hosts, tmp_path)
    alone = [DEEPSPEED, "--num_gpus", "2", "--master_port", PORT, TRAIN, *words, "run.name=one"]
    assert hosts[0].start(alone, tmp_path / "host-a.log", **CPU).wait(timeout=300) == 0, logs(hosts, tmp_path)
    two, one = (tmp_path / "runs" / name for name in ("two", "one"))
    assert numbers(read_metrics(two)) == numbers(read_metrics(one)) and len(read_metrics(one)) == 2
    shards = sorted(path.name for path in (one / "checkpoints/step_2/actor").iterdir())
    assert len(shards) == 2
    for name in shards:
        first, second = ((run / "checkpoints/step_2/actor" / name).read_bytes() for run in (two, one))
        assert first == second, f"{name} differs"


@pytest.mark.parametrize("fault", ["cut", "kill"])
def test_both_sides_end_when_a_host_is_gone(hosts, tmp_path, fault):
    shape = ["actor.parallel.tp=1", "rollout.engine.span=1", "run.steps=1000", f"run.lost_after={LOST_AFTER}"]
    words = [*tiny_run(tmp_path), *shape, "checkpoint.every=1", "checkpoint.background=false"]
    launchers = start_on_both(hosts, tmp_path, words)
    wait_for(tmp_path / "runs/test/checkpoints/latest", launchers, hosts, tmp_path)
    began = time.monotonic()
    hosts[1].cut() if fault == "cut" else hosts[1].kill()
    for launcher in launchers if fault == "cut" else launchers[:1]:
        assert launcher.wait(timeout=60) not in (0, None), logs(hosts, tmp_path)
    assert time.monotonic() - began < 60
    check_told(tmp_path / "host-a.log", "rank 1 on host-b")
    if fault == "cut":
        check_told(tmp_path / "host-b.log", "rank 0 on host-a")
    _, alive = psutil.wait_procs([p for host in hosts for p in host.processes()], timeout=10)
    assert not alive, alive
    saved = checkpoints_in(tmp_path / "runs/test/checkpoints")
    assert saved and all(problem(checkpoint) is None for checkpoint in saved)


def test_a_run_outlives_the_host_of_its_engine(hosts, tmp_path):
    """The host's power fails, without a message; it returns, and its rank is started again."""
    apart = ["rollout.placement=disaggregated", "rollout.engine_ranks=1", "rollout.engine.span=1"]
    words = [*tiny_run(tmp_path), *apart, "actor.parallel.tp=1", "run.steps=60", "checkpoint.every=10"]
    trainer, host = start_on_both(hosts, tmp_path, words)
    wait_for(tmp_path / "runs/test/checkpoints/latest", [trainer, host], hosts, tmp_path)
    hosts[1].lose_power()
    host.wait()
    host = start_on(1, hosts, tmp_path, words)
    assert trainer.wait(timeout=240) == host.wait(timeout=60) == 0, logs(hosts, tmp_path)
    steps = read_metrics(tmp_path / "runs/test")
    assert [step["step"] for step in steps] == list(range(60))
    assert sum(step["engine/restarts"] for step in steps[10:]) == 1, logs(hosts, tmp_path)


def problem(checkpoint: Path) -> str | None:
    files = json.loads((checkpoint / "meta.json").read_text())["files"]
    return check_files(checkpoint, files, files)


def check_told(log: Path, who: str) -> None:
    told = log.read_text()
    assert told.count("error: ") == 1 and "Traceback" not in told, told
    assert f"error: {who} (process " in told and "gave no sign of life" in told and "in phase" in told, told


def wait_for(file: Path, launchers: list[subprocess.Popen], hosts, folder: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert all(launcher.poll() is None for launcher in launchers), logs(hosts, folder)
        assert time.monotonic() < deadline, logs(hosts, folder)
        time.sleep(0.2)
