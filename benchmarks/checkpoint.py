"""What saving costs a run, and whether a run that is killed again and again loses anything.

    python benchmarks/checkpoint.py stall --steps 12 --out stall.json
    python benchmarks/checkpoint.py kills --steps 60 --kills 30 --seed 0 --out kills.json

Both run launch/train.py under the deepspeed launcher, so the actor and drafter must exist (`make drafter`), and save
after every step. `stall` reports what training waited for its saves, as a share of the steps' time. `kills` sends
SIGKILL to every process of the run, launcher, ranks and engine, at moments drawn from --seed, be it starting, resuming,
generating, saving or pushing weights, starts it again with the same command, and looks at what it left: which steps
are in metrics.jsonl, and whether every checkpoint there is valid. The first save is waited for: before it there is
nothing to go on from.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from respec_trainer.checkpoint.megatron_folder import read_meta
from respec_trainer.checkpoint.store import check_files, checkpoints_in
from respec_trainer.network import free_port
from respec_trainer.telemetry.recorder import read_metrics

REPOSITORY = Path(__file__).parent.parent
SPREAD = 45.0  # seconds after a start within which it is killed: about half of them it takes to get going


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("stall", "kills"))
    parser.add_argument("--config", default=str(REPOSITORY / "configs/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = (stall if args.what == "stall" else kills)(args, Path(folder))
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def start(args: argparse.Namespace, folder: Path) -> subprocess.Popen:
    launcher = Path(sys.executable).with_name("deepspeed")
    # The port of a killed run may be held for a while.
    command = [str(launcher), "--num_gpus", str(args.ranks), "--master_port", str(free_port())]
    command += [str(REPOSITORY / "launch/train.py"), "--config", args.config, f"run.dir={folder}", "run.name=run"]
    command += [f"run.steps={args.steps}", "checkpoint.every=1", *args.overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY)


def stall(args: argparse.Namespace, folder: Path) -> dict:
    """The first save takes up memory for the first time, and is told apart."""
    process = start(args, folder)
    if process.wait():
        raise SystemExit(f"the run failed with status {process.returncode}")
    steps = read_metrics(folder / "run")[1:]  # a step's time/checkpoint is of the save after the step before
    shares = [step["time/checkpoint"] / step["time/step"] for step in steps]
    size = sum(file.stat().st_size for file in checkpoints_in(folder / "run/checkpoints")[0].rglob("*"))
    return {
        "saves": len(shares),
        "mb": size / 2**20,
        "first_s": steps[0]["time/checkpoint"],
        "median_s": median(step["time/checkpoint"] for step in steps[1:]),
        "median_share_of_step": median(shares[1:]),
        "largest_share_of_step": max(shares[1:]),
        "step_s": median(step["time/step"] for step in steps),
    }


def kills(args: argparse.Namespace, folder: Path) -> dict:
    draw, killed = random.Random(args.seed), []
    while len(killed) < args.kills:
        process = start(args, folder)
        while not killed and not (folder / "run/checkpoints/latest").is_file() and process.poll() is None:
            time.sleep(0.1)
        try:
            process.wait(draw.uniform(1.0, SPREAD))
            break  # the run was done before it could be killed as often as that
        except subprocess.TimeoutExpired:
            kill(process)
        killed.append(state_of(folder / "run"))
        print(json.dumps(killed[-1]), flush=True)
    else:
        process = start(args, folder)
        process.wait()
    numbers = [step["step"] for step in read_metrics(folder / "run")]
    return {
        "finished": process.returncode == 0,
        "kills": len(killed),
        "runs": len(list(folder.iterdir())),
        "steps_in_order": numbers == list(range(args.steps)),
        "damaged": sum(len(state["damaged"]) for state in killed),
        "after_kills": killed,
    }


def kill(process: subprocess.Popen) -> None:
    """Everything at once, until nothing is left."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait()
    time.sleep(0.5)


def state_of(run: Path) -> dict:
    """What a killed run left: steps on record, checkpoints, and what of them is not whole."""
    found = checkpoints_in(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    damaged = []
    for checkpoint in found:
        problem = check_files(checkpoint, files := read_meta(checkpoint)["files"], sorted(files))
        damaged += [f"{checkpoint.name}: {problem}"] if problem else []
    latest = run / "checkpoints/latest"
    return {
        "steps": len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0,
        "checkpoints": [checkpoint.name for checkpoint in found],
        "latest": latest.read_text().strip() if latest.is_file() else None,
        "half_written": len(list((run / "checkpoints").glob(".*"))) if found else 0,
        "damaged": damaged,
    }


if __name__ == "__main__":
    main()
