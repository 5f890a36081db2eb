"""Kill a run's engine at random moments, and check that the run finishes, that it is complete, and that it learns.

    python benchmarks/kills.py --steps 30 --kills 20 --seed 0 --out kills.json

Runs launch/train.py under the deepspeed launcher and sends SIGKILL to a process of the engine at times drawn from
--seed and spread over the steps of the run: a kill waits for its step, then for a random share of a step's time. There
is no kill in the first step, because a run ends if its engine does not start.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from runs import QUICKSTART, REPOSITORY, run_command

from respec_trainer.telemetry.recorder import read_metrics
from respec_trainer.telemetry.summary import reward_rise

TITLE = "sglang::"  # prefix of the titles of sglang's processes
POLL_SECONDS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.steps={args.steps}", *args.overrides]
        command = run_command(args.ranks, args.config, folder, "kills", overrides)
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        killed = kill_at_random(process, Path(folder) / "kills", args)
        status = process.wait()
        report = {"finished": status == 0, "wall_s": time.perf_counter() - began, "kills": killed}
        report |= numbers(read_metrics(Path(folder) / "kills"), args.steps)
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def kill_at_random(process: subprocess.Popen, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Kill until the run ends or all kills are done; return each killed process and the number of finished steps."""
    draw = random.Random(args.seed)
    moments = sorted(draw.uniform(1, args.steps) for _ in range(args.kills))
    killed: list[dict] = []
    while process.poll() is None and len(killed) < args.kills:
        time.sleep(POLL_SECONDS)
        moment = moments[len(killed)]
        steps = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        if len(steps) < int(moment):
            continue
        time.sleep(moment % 1 * steps[-1]["time/step"])
        victims = engine_processes(process)
        if victims:
            victim = draw.choice(victims)
            killed.append({"process": victim.name(), "step": len(steps)})
            victim.send_signal(signal.SIGKILL)
    return killed


def engine_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the running engine processes below the launcher, recognized by their titles."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
        try:
            title = child.cmdline()[:1]
        except psutil.NoSuchProcess:
            continue
        if title and title[0].startswith(TITLE):
            found.append(child)
    return found


def numbers(steps: list[dict], wanted: int) -> dict:
    if not steps:
        return {"steps": 0}
    first, last = reward_rise(steps)
    counted = ("restarts", "lost_tokens", "resumed_tokens")
    sums = {name: sum(step[f"engine/{name}"] for step in steps) for name in counted}
    return {"steps": len(steps), "complete": len(steps) == wanted, "reward_first": first, "reward_last": last, **sums}


if __name__ == "__main__":
    main()
