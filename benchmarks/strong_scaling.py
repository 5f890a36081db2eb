"""Measure the same run on 1, 2 and 4 ranks: the time of a step by phase, and the speed-up.

    python benchmarks/strong_scaling.py --ranks 1 2 4 --steps 8 --out scaling.json

Runs launch/train.py under the deepspeed launcher with the same global batch, data parallel with one engine a rank, so
the actor and drafter must exist (`make drafter`). Every round runs each number of ranks once. More ranks on the same
cores give no speed-up, so the report includes the number of cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from runs import QUICKSTART, REPOSITORY, run_command

from respec_trainer.telemetry.recorder import read_metrics

PHASES = ("step", "generate", "infer", "train", "resync")
LAYOUT = ("actor.parallel.tp=1", "rollout.engine.tp=1", "rollout.engine.span=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=QUICKSTART)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    runs: dict[int, list[dict]] = {ranks: [] for ranks in args.ranks}
    for _ in range(args.rounds):
        for ranks in args.ranks:
            runs[ranks] += run(args, ranks)
    seconds = {ranks: {phase: median(step[f"time/{phase}"] for step in steps) for phase in PHASES}
               for ranks, steps in runs.items()}  # fmt: skip
    print(table(seconds))
    if args.out:
        args.out.write_text(json.dumps({"cores": os.cpu_count(), "seconds": seconds}, indent=2))


def run(args: argparse.Namespace, ranks: int) -> list[dict]:
    """Return the metrics of a run's steps except the first, which includes one-time work."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.steps={args.steps}", *LAYOUT, *args.overrides]
        command = run_command(ranks, args.config, folder, "run", overrides)
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        return read_metrics(Path(folder) / "run")[1:]


def table(seconds: dict[int, dict[str, float]]) -> str:
    """Return a Markdown table: seconds of each phase, and the speed-up of a step over the fewest ranks."""
    lines = [f"{os.cpu_count()} cores", "", f"| ranks | {' | '.join(PHASES)} | to {min(seconds)} |"]
    lines.append("|---" * (len(PHASES) + 2) + "|")
    first = seconds[min(seconds)]["step"]
    for ranks, taken in sorted(seconds.items()):
        cells = " | ".join(f"{taken[phase]:.2f}" for phase in PHASES)
        lines.append(f"| {ranks} | {cells} | {first / taken['step']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
