"""Measure the time that saving takes from a run, and test that a run that is killed many times loses nothing.

    python benchmarks/checkpoint.py stall --steps 12 --out stall.json
    python benchmarks/checkpoint.py kills --steps 60 --kills 30 --seed 0 --out kills.json

Both run launch/train.py under the deepspeed launcher, so the actor and drafter must exist (`make drafter`), and save
after every step. `stall` reports the time that training waits for its saves, as a share of the steps' time. `kills`
sends SIGKILL to every process of the run, launcher, ranks and engine, at moments drawn from --seed, starts the run
again with the same command, and checks its files: the steps in metrics.jsonl, and every checkpoint. Of every four kills
one comes at any moment, also while the run starts, resumes or generates, and one each in the middle of saving, of
pushing weights, and of converting a checkpoint with respec-convert, which is killed with the run. The report counts the
activities that were interrupted. No kill comes before the first save, because there is no checkpoint to resume from.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from statistics import median

import psutil
from phase_file import PHASE_FILE
from runs import QUICKSTART, REPOSITORY, run_command

from respec_trainer.checkpoint.meta import check_files, read_meta
from respec_trainer.checkpoint.store import checkpoints_in, latest, step_of
from respec_trainer.convert.command import main as convert
from respec_trainer.telemetry.recorder import read_metrics

SPREAD = 45.0  # most seconds from a start to its kill; starting takes about half of them
AIMS = ("any moment", "saving", "resyncing", "converting")
WITHIN = 0.05  # most seconds from the start of the intended activity to the kill
PATIENCE = 300.0  # most seconds to wait for the intended activity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("stall", "kills"))
    parser.add_argument("--config", default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        report = (stall if args.what == "stall" else kills)(args, Path(folder))
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def start(args: argparse.Namespace, folder: Path, script: str = "launch/train.py", **environment) -> subprocess.Popen:
    overrides = [f"run.steps={args.steps}", "checkpoint.every=1", *args.overrides]
    command = run_command(args.ranks, args.config, folder, "run", overrides, script)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | environment, **quiet)


def stall(args: argparse.Namespace, folder: Path) -> dict:
    """Measure the saves of one run. The first save allocates its memory, so it is reported separately."""
    process = start(args, folder)
    if process.wait():
        raise SystemExit(f"the run failed with status {process.returncode}")
    steps = read_metrics(folder / "run")[1:]  # time/checkpoint of a step belongs to the save after the previous step
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
    draw, killed, target = random.Random(args.seed), [], Target(args, folder)
    for aim in itertools.islice(itertools.cycle(AIMS), args.kills):
        target.start()
        if not target.wait_for(aim, draw):
            break  # the run ended before the last kill
        met = target.kill()
        killed.append({"aim": aim, "met": met, **state_of(target.run), **target.converted_again()})
        print(json.dumps(killed[-1]), flush=True)
    else:
        target.start()
    target.process.wait()
    target.converted_again()
    numbers = [step["step"] for step in read_metrics(target.run)]
    reached = [state["latest"] for state in killed]
    return {
        "finished": target.process.returncode == 0,
        "kills": len(killed),
        "met": {aim: sum(aim in state["met"] for state in killed) for aim in AIMS[1:]},
        "runs": len(list(target.run.parent.iterdir())),
        "steps_in_order": numbers == list(range(args.steps)),
        "newest_checkpoint_never_older": reached == sorted(reached),
        "damaged": sum(len(state["damaged"]) for state in killed),
        "conversions_wrong": sum(state.get("conversion") == "wrong" for state in killed),
        "after_kills": killed,
    }


class Target:
    """The run that is killed, and a conversion of its newest checkpoint beside it."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.run = args, folder / "runs/run"
        self.phase, self.out = folder / "phase", folder / "converted"
        self.process: subprocess.Popen
        self.converting: subprocess.Popen | None = None

    def start(self) -> None:
        self.phase.unlink(missing_ok=True)
        phases = {PHASE_FILE: str(self.phase)}
        self.process = start(self.args, self.run.parent, "benchmarks/phase_file.py", **phases)

    def wait_for(self, aim: str, draw: random.Random) -> bool:
        """Wait for the moment of the kill; return False if the run ended before it."""
        while latest(self.run / "checkpoints") is None and self.process.poll() is None:
            time.sleep(0.1)
        moment = time.monotonic() + draw.uniform(1.0, SPREAD)
        while time.monotonic() < moment and self.process.poll() is None:
            time.sleep(0.01)
        if aim == "converting" and self.process.poll() is None:
            checkpoint = ["--checkpoint", str(latest(self.run / "checkpoints"))]
            command = [sys.executable, "tools/convert_checkpoint.py", "to-hf", *checkpoint, "--out", str(self.out)]
            self.converting = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + PATIENCE
        while aim != "any moment" and aim not in self.doing():
            if self.process.poll() is not None or time.monotonic() > limit or self._converted():
                break
            time.sleep(1e-3)
        time.sleep(draw.uniform(0.0, WITHIN))
        return self.process.poll() is None

    def doing(self) -> list[str]:
        """Return the AIMS that are in progress."""
        signs = {
            "saving": any((self.run / "checkpoints").glob(".step_*.partial-*")),
            "resyncing": self.phase.is_file() and self.phase.read_text() == "resync",
            "converting": any(self.out.parent.glob(f".{self.out.name}.partial-*")),
        }
        return [aim for aim, sign in signs.items() if sign]

    def kill(self) -> list[str]:
        """Kill all processes; return the activities that were in progress.

        All processes are suspended first, so that none can start another one meanwhile.
        """
        family: dict[int, psutil.Process] = {}
        roots = [each.pid for each in (self.process, self.converting) if each and each.poll() is None]
        while found := {p.pid: p for root in roots for p in tree(root) if p.pid not in family}:
            for member in found.values():
                with suppress(psutil.NoSuchProcess):
                    member.suspend()
            family |= found
        met = self.doing()
        for member in family.values():
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family.values(), timeout=30)
        self.process.wait()
        time.sleep(0.5)
        return met

    def converted_again(self) -> dict:
        """Check that the killed conversion left a complete folder or none, and that a second one succeeds after it."""
        if self.converting is None:
            return {}
        self.converting.wait()
        self.converting = None
        checkpoint = latest(self.run / "checkpoints")
        with redirect_stdout(io.StringIO()):
            right = not self.out.exists() or convert(["inspect", str(self.out)]) == 0
            shutil.rmtree(self.out, ignore_errors=True)
            right &= convert(["to-hf", "--checkpoint", str(checkpoint), "--out", str(self.out), "--dtype", "fp32"]) == 0
            right &= convert(["verify", str(self.out), str(checkpoint), "--tokens", "0"]) == 0
        right &= not any(self.out.parent.glob(f".{self.out.name}.partial-*"))
        shutil.rmtree(self.out, ignore_errors=True)
        return {"conversion": "right" if right else "wrong"}

    def _converted(self) -> bool:
        return self.converting is not None and self.converting.poll() is not None


def tree(root: int) -> list[psutil.Process]:
    """Return a process and all its descendants; [] if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return []


def state_of(run: Path) -> dict:
    """Return the state of a killed run's folder: recorded steps, checkpoints, and damaged or incomplete ones."""
    found = checkpoints_in(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    damaged = []
    for checkpoint in found:
        problem = check_files(checkpoint, files := read_meta(checkpoint)["files"], sorted(files))
        damaged += [f"{checkpoint.name}: {problem}"] if problem else []
    named = latest(run / "checkpoints")
    return {
        "steps": len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0,
        "checkpoints": [checkpoint.name for checkpoint in found],
        "latest": step_of(named) if named else 0,
        "half_written": len(list((run / "checkpoints").glob(".*"))) if found else 0,
        "damaged": damaged,
    }


if __name__ == "__main__":
    main()
