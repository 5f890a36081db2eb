"""Draw responses for an audit until their number suffices for its standard, and compute the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from respec_trainer.audit.report import CellResult, Standard
from respec_trainer.audit.statistics import Evidence
from respec_trainer.audit.tree import Prefix, joint_law
from respec_trainer.rollout.engine import RolloutEngine
from respec_trainer.rollout.sample import Request, Sample, SamplingParams, accept_length

ROUND = 6144  # responses drawn between two checks of the power
NEW_TOKENS = 24


class LawCache:
    """The laws after prefixes, each computed once."""

    def __init__(self, law: Callable[[Sequence[Prefix]], torch.Tensor]):
        self.law, self.known = law, {}

    def __call__(self, prefixes: Sequence[Prefix]) -> torch.Tensor:
        new = [prefix for prefix in prefixes if prefix not in self.known]
        if new:
            self.known |= dict(zip(new, self.law(new), strict=True))
        return torch.stack([self.known[prefix] for prefix in prefixes])


@dataclass(frozen=True)
class Plan:
    """The responses to draw, and the law that they must follow."""

    name: str
    prompts: Sequence[Prefix]  # token ids; all prompts get the same number of draws
    params: SamplingParams
    law: Callable[[Sequence[Prefix]], torch.Tensor]  # prefixes -> probabilities [R, V] float64
    limits: tuple[int, ...] = ()  # values of max_new_tokens, in turn; (): that of `params`
    # Responses and the parameters of each -> faults that can be found without statistics.
    check: Callable[[Sequence[Sample], Sequence[SamplingParams]], set[str]] = lambda samples, asked: set()

    def asked(self, count: int) -> list[SamplingParams]:
        """Return the parameters of `count` requests."""
        limits = self.limits or (self.params.max_new_tokens,)
        each = len(self.prompts)
        return [replace(self.params, max_new_tokens=limits[i // each % len(limits)]) for i in range(count)]


def examine(
    engine: RolloutEngine, plan: Plan, standard: Standard, cells: int, limit: int, draws: int = ROUND
) -> CellResult:
    """Draw and test responses, in rounds of `draws`, until the standard's power or `limit` is reached.

    The number of draws depends on how the draws spread, never on the statistic: that would change the statistic's law.

    Args:
        cells: number of tests that share the standard's level.
    """
    began, samples, law = time.perf_counter(), [], LawCache(plan.law)
    faults: set[str] = set()
    while True:
        asked = plan.asked(min(draws, limit))
        prompts = [plan.prompts[i % len(plan.prompts)] for i in range(len(asked))]
        requests = [Request(str(i), *pair) for i, pair in enumerate(zip(prompts, asked, strict=True))]
        drawn = engine.submit(requests).collect()
        faults |= plan.check(drawn, asked)
        samples += drawn
        evidence = joint_law([(tuple(s.prompt_ids), s.response_ids) for s in samples], law)
        power = evidence.power(standard.total_variation, standard.level / cells)
        if power >= standard.power or len(samples) >= limit:
            return _result(plan.name, evidence, samples, time.perf_counter() - began, tuple(sorted(faults)))


def _result(name: str, evidence: Evidence, samples: list[Sample], seconds: float, faults: tuple[str, ...]):
    tokens = sum(len(sample.response_ids) for sample in samples)
    return CellResult(name, evidence, len(samples), tokens, accept_length(samples), seconds, faults)
