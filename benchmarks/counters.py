"""Measure the cost of token origins: collating samples and summing their mismatch, with and without origins.

    python benchmarks/counters.py --rounds 20 --out counters.json

The arms differ in the origins only: the samples of `split` have an origin for each token, and the divergence is split
by them; the samples of `whole` have none. The arms take turns in one process. The report has the median over rounds of
the ratio of split's time to whole's in the same round, and the median seconds of both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from respec_trainer.objective.mismatch import ORIGINS, mismatch_metrics
from respec_trainer.rollout.batch import collate
from respec_trainer.rollout.sample import Sample

SHAPES = ((128, 96), (1024, 2048))  # responses x tokens: the quickstart's step, and a large one
PROMPT = [1] * 16
ARMS = {"whole": {}, "split": ORIGINS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {f"{rows}x{tokens}": compare(rows, tokens, args.rounds) for rows, tokens in SHAPES}
    report = {"rounds": args.rounds, "threads": args.threads, "shapes": results}
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def compare(rows: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds of each arm and their median ratio, for collating, for the sums and for both together."""
    samples = {name: make_samples(rows, tokens, bool(origins)) for name, origins in ARMS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for number in range(rounds + 1):
        # The order alternates, so that neither arm always runs second with a warm memory.
        for name in sorted(ARMS, reverse=bool(number % 2)):
            took = step(samples[name], ARMS[name])
            if number:  # the first round warms up
                seconds[name].append(took)
    parts = {"collate": lambda took: took[0], "sums": lambda took: took[1], "both": sum}
    return {part: summary({name: list(map(pick, seconds[name])) for name in ARMS}) for part, pick in parts.items()}


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [split / whole for split, whole in zip(seconds["split"], seconds["whole"], strict=True)]
    return {"split_to_whole": median(ratios)} | {f"{name}_seconds": median(taken) for name, taken in seconds.items()}


def step(samples: list[Sample], origins: dict[str, int]) -> tuple[float, float]:
    """Return (seconds to collate, seconds to measure the mismatch split by these origins)."""
    began = time.perf_counter()
    batch = collate(samples, pad_id=0)
    collated = time.perf_counter()
    log_ratio = batch.sampler_logprobs * 0.01
    mask, unchanged = batch.response_mask, torch.zeros_like(batch.response_mask)
    started = time.perf_counter()
    mismatch_metrics(log_ratio, mask, unchanged, batch.origins, names=origins)
    return collated - began, time.perf_counter() - started


def make_samples(rows: int, tokens: int, origins: bool) -> list[Sample]:
    """Make responses of one length. Their origins, if wanted, repeat three accepted drafts and a bonus token."""
    ids, logprobs = list(range(tokens)), (-torch.rand(tokens)).tolist()
    cycle = [1, 1, 1, 2] * (tokens // 4) if origins else []
    return [
        Sample(f"{row}", PROMPT, ids, logprobs, "length", "actor-0", "drafter-0", origins=cycle) for row in range(rows)
    ]


if __name__ == "__main__":
    main()
