"""A rank under the watchdog, as launch/train.py is, with a loop of two phases and a collective in each.

It starts a child, as a rank starts an engine. After the ranks have connected it prints one line: its own process id and
the child's. On rank `victim` the `fault`, "sleep" or "raise", happens in phase "train" of step 3; "none": never. The
loop ends when the file named by STOP_FILE exists.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from respec_trainer.config import RunConfig
from respec_trainer.interrupt import end_on_signal, end_process
from respec_trainer.watchdog import Watchdog

FAULT_STEP = 3


def live(environment: dict[str, str], out: Path, err: Path, *settings) -> None:
    """Run such a rank in a process that was forked for it; its output goes to the files `out` and `err`."""
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    main(*settings)


def main(victim: int, fault: str, lost_after: float, hang_timeout: float) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = RunConfig(name="watched", steps=1, lost_after=lost_after, hang_timeout=hang_timeout)
    watchdog = Watchdog(run, rank, world, world)
    end_on_signal(watchdog.signalled)
    child = subprocess.Popen(["sleep", "300"])
    try:
        watchdog.start()
        dist.init_process_group("gloo")
        watchdog.met()
        print(f"ready {os.getpid()} {child.pid}", flush=True)
        loop(watchdog, fault if rank == victim else "none")
        watchdog.stop()
    except BaseException as error:
        watchdog.fail(error, traceback.print_exc)
        end_process(1)
    end_process(0)


def loop(watchdog: Watchdog, fault: str) -> None:
    stop = Path(os.environ["STOP_FILE"])
    for step in count(1):
        for phase in ("generate", "train"):
            watchdog.enter(step, phase)
            ended = torch.tensor([float(stop.exists())])
            all_reduce(ended, fault if (step, phase) == (FAULT_STEP, "train") else "none")
            if ended.item():
                return
        time.sleep(0.05)


def all_reduce(tensor: torch.Tensor, fault: str) -> None:
    if fault == "raise":
        raise ValueError("a planted fault")
    if fault == "sleep":
        sleep_in_a_collective()
    dist.all_reduce(tensor)


def sleep_in_a_collective() -> None:
    time.sleep(1e6)
