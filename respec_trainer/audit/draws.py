"""Drawing responses for an audit, enough of them for its standard, and their evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from respec_trainer.audit.report import CellResult, Standard
from respec_trainer.audit.statistics import Evidence
from respec_trainer.audit.tree import Prefix, joint_law
from respec_trainer.rollout.engine import RolloutEngine
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

ROUND = 8192  # responses drawn before the power is looked at again
NEW_TOKENS = 24
LIMITS = (3, 8, 13, 24)  # of requests whose limits differ


class LawCache:
    """Laws after prefixes, each computed once."""

    def __init__(self, law: Callable[[Sequence[Prefix]], torch.Tensor]):
        self.law, self.known = law, {}

    def __call__(self, prefixes: Sequence[Prefix]) -> torch.Tensor:
        new = [prefix for prefix in prefixes if prefix not in self.known]
        if new:
            self.known |= dict(zip(new, self.law(new), strict=True))
        return torch.stack([self.known[prefix] for prefix in prefixes])


def examine(
    name: str,
    engine: RolloutEngine,
    prompts: Sequence[Prefix],
    params: SamplingParams,
    law: Callable[[Sequence[Prefix]], torch.Tensor],
    standard: Standard,
    cells: int,
    limit: int,
    ends: Callable[[Sample, SamplingParams], str | None] | None = None,
) -> CellResult:
    """Draw until the standard's power is reached, or `limit` responses, and test them.

    How many are drawn hangs on how the draws spread, never on the statistic, which would bend its law.

    Args:
        prompts: token ids; each gets as many draws as the others.
        law: prefixes -> probabilities [R, V] float64.
        cells: tests that share the standard's level.
        ends: what is wrong with a response's end, if limits are to differ; then also given its own parameters.
    """
    began, samples, cached = time.perf_counter(), [], LawCache(law)
    faults: set[str] = set()
    while True:
        asked = [
            replace(params, max_new_tokens=LIMITS[i // len(prompts) % len(LIMITS)] if ends else params.max_new_tokens)
            for i in range(min(ROUND, limit))
        ]
        drawn = engine.submit(
            [Request(str(i), prompts[i % len(prompts)], ask) for i, ask in enumerate(asked)]
        ).collect()
        if ends is not None:
            faults |= {fault for sample, ask in zip(drawn, asked, strict=True) if (fault := ends(sample, ask))}
        samples += drawn
        evidence = joint_law([(tuple(s.prompt_ids), s.response_ids) for s in samples], cached)
        power = evidence.power(standard.total_variation, standard.level / cells)
        if power >= standard.power or len(samples) >= limit:
            return _result(name, evidence, samples, time.perf_counter() - began, tuple(sorted(faults)))


def _result(name: str, evidence: Evidence, samples: list[Sample], seconds: float, faults: tuple[str, ...]):
    passes = sum(s.verify_count for s in samples)
    drafts = sum(d * n for s in samples for d, n in enumerate(s.accept_histogram))
    accept = 1 + drafts / passes if passes else 1.0
    return CellResult(name, evidence, len(samples), sum(len(s.response_ids) for s in samples), accept, seconds, faults)
