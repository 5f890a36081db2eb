"""Run the quickstart with and without speculation in turns, and compare rollout speed and reward.

    python benchmarks/quickstart.py --pairs 2 --out quickstart.json

Runs launch/train.py under the deepspeed launcher, so the actor and drafter must exist (`make drafter`). Each run's peak
memory is the largest sum of proportional set sizes over its processes, sampled once a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import fmean

import psutil
from runs import QUICKSTART, REPOSITORY, run_command

from respec_trainer.telemetry.recorder import read_metrics
from respec_trainer.telemetry.summary import reward_rise

ARMS = {"speculation": [], "plain": ["speculation.algorithm=none"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=QUICKSTART)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    results: dict[str, list[dict]] = {name: [] for name in ARMS}
    for pair in range(args.pairs):
        # The first arm alternates between pairs, so that a machine that warms up favors neither arm.
        for name in sorted(ARMS, reverse=bool(pair % 2)):
            results[name].append(run(args, [*ARMS[name], f"run.seed={pair}", *args.overrides]))
            print(name, json.dumps(results[name][-1]), flush=True)
    report = compare(results)
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps({"runs": results, **report}, indent=2))


def run(args: argparse.Namespace, overrides: list[str]) -> dict:
    """Run once and return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        command = run_command(args.ranks, args.config, folder, "benchmark", overrides)
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        peak = watch_memory(process)
        if process.returncode:
            raise SystemExit(f"run failed with status {process.returncode}: {' '.join(command)}")
        steps = read_metrics(Path(folder) / "benchmark")
        return {"wall_s": time.perf_counter() - began, "peak_gb": peak / 1e9, **numbers(steps)}


def numbers(steps: list[dict]) -> dict:
    first, last = reward_rise(steps)
    tokens, seconds = (sum(step[key] for step in steps) for key in ("rollout/tokens", "time/generate"))
    return {
        "reward_first": first,
        "reward_last": last,
        "reward_rise": last - first,
        "tokens_per_second": tokens / seconds,
        "accept_length": fmean(step["spec/accept_length"] for step in steps),
        "generate_s": seconds,
        "step_s": sum(step["time/step"] for step in steps),
        "steps": len(steps),
    }


def watch_memory(process: subprocess.Popen) -> int:
    """Wait for the process; return the peak memory of it and its descendants in bytes."""
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(proportional_size(p) for p in [root, *children(root)]))
        time.sleep(1.0)
    return peak


def children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def proportional_size(process: psutil.Process) -> int:
    """Return the memory of one process in bytes; a page that k processes share counts 1/k."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def compare(results: dict[str, list[dict]]) -> dict:
    """Compare speculation with plain decoding over the pairs."""
    on, off = results["speculation"], results["plain"]
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(on, off, strict=True)]
    return {
        "rollout_speedup": ratios,
        "reward_rise": {"speculation": [r["reward_rise"] for r in on], "plain": [r["reward_rise"] for r in off]},
        "accept_length": fmean(r["accept_length"] for r in on),
        "peak_gb": max(r["peak_gb"] for r in on),
    }


if __name__ == "__main__":
    main()
