"""Simulate the audit of an engine: how often does it refute a right engine, and find a wrong one?

    python benchmarks/audit_power.py --audits 200 --faulty 30

An engine without a model draws responses from a table of distributions of the next token, in which the last token
decides; it is right, or has a fault. Each audit is of one cell, with the draws that this cell asks for at the level of
22 cells, as the whole audit has. Prints for each fault how often each of the three tests found it at that level, how
often one of them did, and what the audit promised; for the right engine, how often an audit failed at the level of one
cell, and a Kolmogorov-Smirnov test that the p-values of each test are uniform.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import kstest

from benchmarks.audit_pairs import VOCAB, Fault, accept, shift, zipf_logits
from respec_trainer.audit.draws import NEW_TOKENS, Plan, examine
from respec_trainer.audit.law import laws
from respec_trainer.audit.report import TESTS, CellResult, Standard, judge
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

END, PROMPTS, CELLS = 0, ((5,), (9,), (13,), (17,)), 22
STANDARD = Standard()
TOP, SECOND, THIRD, TAIL = slice(0, 1), slice(1, 2), slice(2, 3), slice(8, None)
FAULTS: dict[str, Fault] = {
    "accepted with p / 0.9": accept(0.9),
    "0.02 from all others to the top": shift(0.02, slice(1, None), TOP),
    "0.02 from the top to all others": shift(0.02, TOP, slice(1, None)),
    "0.02 from the top to the ranks from 9 on": shift(0.02, TOP, TAIL),
    "0.02 from rank 2 to rank 3": shift(0.02, SECOND, THIRD),
    "0.02 from rank 3 to rank 2": shift(0.02, THIRD, SECOND),
    "0.02 within a class: ranks 4 to 5 to ranks 6 to 8": shift(0.02, slice(3, 5), slice(5, 8)),
}


class TableEngine:
    """Draws from a table [V, V] of probabilities of the next token after the last one."""

    def __init__(self, table: torch.Tensor, seed: int):
        self.table, self.generator, self.asked = table, torch.Generator().manual_seed(seed), []

    def submit(self, requests: Sequence[Request]) -> TableEngine:
        self.asked = list(requests)
        return self

    def collect(self) -> list[Sample]:
        last = torch.tensor([request.prompt_ids[-1] for request in self.asked])
        columns = []
        for _ in range(NEW_TOKENS):
            last = torch.multinomial(self.table[last], 1, generator=self.generator)[:, 0]
            columns.append(last)
        return [self._sample(*of_one) for of_one in zip(self.asked, torch.stack(columns, 1).tolist(), strict=True)]

    def _sample(self, request: Request, tokens: list[int]) -> Sample:
        kept = tokens[: tokens.index(END) + 1] if END in tokens else tokens
        return Sample(request.key, list(request.prompt_ids), kept, [0.0] * len(kept), "length", "a", "d")


def audit(seed: int, fault: Fault | None = None) -> CellResult:
    """Audit one cell of an engine with this fault."""
    params, generator = SamplingParams(NEW_TOKENS), torch.Generator().manual_seed(seed)
    order = torch.rand(VOCAB, VOCAB, generator=generator).argsort(1)
    logits = zipf_logits(VOCAB, generator).gather(1, order)
    logits[:, END] -= 3  # responses of different lengths, few of them short
    table = laws(logits, params).probs
    plan = Plan("cell", PROMPTS, params, lambda prefixes: laws(logits[[prefix[-1] for prefix in prefixes]], params))
    return examine(TableEngine(fault(table) if fault else table, seed), plan, STANDARD, CELLS, limit=40_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audits", type=int, default=200, help="of a right engine")
    parser.add_argument("--faulty", type=int, default=30, help="of an engine with each fault")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, level = Console(width=140), STANDARD.level / (CELLS * len(TESTS))
    view = Table("fault", *(f"by the {test}" for test in TESTS), "by any", "promised", "draws", "uncertain")
    for name, fault in FAULTS.items():
        results = [audit(seed, fault) for seed in range(args.faulty)]
        found = np.array([result.p_values for result in results]) < level
        promised = min(STANDARD.power_of(result.scores, CELLS) for result in results)
        sizes = [f"{np.mean([result.draws for result in results]):,.0f}"]
        sizes += [f"{np.mean([result.scores.uncertain.reached for result in results]):,.0f}"]
        shares = [*found.mean(0), found.any(1).mean()]
        view.add_row(name, *(f"{share:.2f}" for share in shares), f"{promised:.3f}", *sizes)
    console.print(view)
    results = [audit(1000 + seed) for seed in range(args.audits)]
    refuted = sum(judge([result], STANDARD)[0].refuted for result in results)
    uniform = [kstest(p, "uniform").pvalue for p in zip(*(result.p_values for result in results), strict=True)]
    console.print(f"a right engine: {refuted} of {args.audits} audits refuted at a level of {STANDARD.level}; uniform:")
    console.print(", ".join(f"{test} {p:.2g}" for test, p in zip(TESTS, uniform, strict=True)))


if __name__ == "__main__":
    main()
