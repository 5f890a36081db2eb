"""Simulate the audit inside training: how often does it fail a right run, and how soon does it find a wrong one?

    python benchmarks/audit_size.py size --audits 200 --tokens 100000
    python benchmarks/audit_size.py faults --tokens 100000

`size` audits pairs of actor and sampler without a fault, and prints for each setting the divergence of the pair, the
largest ratio, a Kolmogorov-Smirnov test that the p-values of the audits are uniform, how many are below 1e-3, and the
p-value of all their tokens together; and the p-value of a fifth of the tokens, each counted as 1 instead of by its
ratio. The seconds are of this machine.

`faults` plants faults, and prints after how many tokens the p-value of all tokens so far was below the level.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import kstest

from benchmarks.audit_pairs import Fault, Pair, accept, outdated, shift
from respec_trainer.audit.rollouts import LEVEL
from respec_trainer.audit.scores import Strata
from respec_trainer.objective.kl import k3
from respec_trainer.rollout.sample import SamplingParams

CHUNK = 20_000  # tokens computed at once
BF16 = {"KL 3.5e-4": 0.034, "KL 1e-3": 0.062}  # errors of logits that give these divergences
PAIRS = {
    **{name: Pair(error) for name, error in BF16.items()},
    "KL 1e-3, top_p 0.9": Pair(BF16["KL 1e-3"], params=SamplingParams(1, top_p=0.9)),
    "KL 1e-3, top_k 8": Pair(BF16["KL 1e-3"], params=SamplingParams(1, top_k=8)),
    "stale": Pair(BF16["KL 3.5e-4"], stale=0.1),
    "very stale": Pair(BF16["KL 3.5e-4"], stale=0.4),
}
FAULTS: dict[str, Fault] = {
    "drafts accepted with p / 0.9": accept(0.9),
    "drafts accepted with p + 0.01": accept(1.0, 0.01),
    "0.02 of the mass moved to the likeliest token": shift(0.02, slice(1, None), slice(0, 1)),
    "weights older than the log-probs, logits off by 0.2": outdated(0.2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("size", "faults"))
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of one audit")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(*SIZE if args.what == "size" else ("fault, at a KL of 1e-3", "tokens", "p", "ratios: p"))
    for row in size(args) if args.what == "size" else faults(args):
        Console(width=140).print(row)
        table.add_row(*row)
    Console(width=140).print(table)


SIZE = ("pair", "KL", "largest ratio", "KS p", "p < 1e-3", "all: p", "ratios: p", "counted as 1: p", "seconds")


def size(args: argparse.Namespace):
    """Yield a row of each setting."""
    for name, pair in PAIRS.items():
        if args.only not in name:
            continue
        began, generator = time.perf_counter(), torch.Generator().manual_seed(args.seed)
        audits = [audit(pair, args.tokens, generator) for _ in range(args.audits)]
        p_values = [sums.both().p_value for sums, _, _ in audits]
        total, unweighted = (sum(parts[1:], parts[0]) for parts in list(zip(*audits, strict=True))[:2])
        log_ratios = torch.cat([log_ratio for _, _, log_ratio in audits])
        yield (
            name,
            f"{float(k3(log_ratios[log_ratios.isfinite()]).mean()):.2g}",
            f"{float(log_ratios.max().exp()):.3g}",
            f"{kstest(p_values, 'uniform').pvalue:.2g}",
            f"{sum(p < 1e-3 for p in p_values)} of {args.audits}",
            f"{total.both().p_value:.2g}",
            f"{total.whole.ratio_p_value():.2g}",
            f"{unweighted.both().p_value:.2g}",
            f"{time.perf_counter() - began:.0f}",
        )


def audit(pair: Pair, tokens: int, generator: torch.Generator) -> tuple[Strata, Strata, torch.Tensor]:
    """Return the sums of one audit, those with every token counted as 1 of its first tokens, and their log rho."""
    drawn = [pair.draw(min(CHUNK, tokens - start), generator) for start in range(0, tokens, CHUNK)]
    parts = [some.sums() for some in drawn]
    return sum(parts[1:], parts[0]), drawn[0].sums(weighted=False), drawn[0].log_ratios()


def faults(args: argparse.Namespace):
    """Yield a row of each fault."""
    for name, fault in FAULTS.items():
        if args.only not in name:
            continue
        generator, total = torch.Generator().manual_seed(args.seed), None
        for _ in range(args.audits):
            sums = PAIRS["KL 1e-3"].draw(args.tokens, generator, fault).sums()
            total = sums if total is None else total + sums
            if min(total.both().p_value, total.whole.ratio_p_value()) < LEVEL:
                break
        yield name, f"{total.whole.draws:,.0f}", f"{total.both().p_value:.2g}", f"{total.whole.ratio_p_value():.2g}"


if __name__ == "__main__":
    main()
