"""rollout/remote/link.py between two hosts: both sides detect a lost machine or cable."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes.hosts import Host, missing, two_hosts

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SIDE = """
import os, socket, sys, time
import torch.distributed as dist
from respec_trainer.rollout.remote import link

# Less than the 40 s of a run: probe after 1 s of silence; sent data may stay unacknowledged for 3 s.
link.KEEPALIVE = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 2, socket.TCP_USER_TIMEOUT: 3000}
if sys.argv[1] == "trainer":
    store = dist.TCPStore(*link.store_address(), is_master=True, wait_for_workers=False)
    connection = link.reach(store, 0, 60)
    connection.send("go on")
else:
    connection = link.offer(link.job_store(60), 0)
    assert connection.recv() == "go on"
print("met", flush=True)
if sys.argv[2] == "sends":
    while not os.path.exists(sys.argv[3]):  # from then on the cable is cut
        time.sleep(0.1)
    connection.send("not received")
try:
    connection.recv()
except OSError as error:
    print("lost:", error.strerror, flush=True)
"""


def start(host: Host, folder: Path, store: Host, *words: str) -> tuple[subprocess.Popen, Path]:
    log = folder / f"{host.name}.log"
    where = {"MASTER_ADDR": store.address, "MASTER_PORT": "29500"}
    return host.start([sys.executable, "-c", SIDE, *words], log, **where), log


@pytest.mark.parametrize("trainer", ["listens", "sends"])
def test_both_sides_detect_the_loss_of_the_other(tmp_path, trainer):
    with two_hosts() as hosts:
        out = tmp_path / "out"
        sides = [start(hosts[0], tmp_path, hosts[0], "trainer", trainer, str(out))]
        sides.append(start(hosts[1], tmp_path, hosts[0], "host", "listens"))
        wait_for("met", sides, seconds=60)
        hosts[1].cut()
        out.touch()
        for process, log in sides:
            assert process.wait(timeout=20) == 0, log.read_text()
            # A kernel may report "No route to host" once it has stopped searching for the neighbor.
            assert log.read_text().split("lost: ")[1].strip() in ("Connection timed out", "No route to host")


def wait_for(word: str, sides, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not all(word in log.read_text() for _, log in sides):
        assert all(process.poll() is None for process, _ in sides), [log.read_text() for _, log in sides]
        assert time.monotonic() < deadline, [log.read_text() for _, log in sides]
        time.sleep(0.1)
