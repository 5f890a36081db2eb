"""Draw responses for an audit until their number suffices for its standard, and compute the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from respec_trainer.audit.report import CellResult, Standard
from respec_trainer.audit.scores import Strata
from respec_trainer.audit.statistics import Evidence
from respec_trainer.audit.tree import LawsAfter, Prefix, joint_law, token_scores, tree_of
from respec_trainer.rollout.engine import RolloutEngine
from respec_trainer.rollout.sample import Request, Sample, SamplingParams, accept_length

ROUND = 4096  # least responses drawn for a cell; after them it is known how many it needs
NEW_TOKENS = 24
MARGIN = 1.05  # of the number of responses that are expected to suffice


@dataclass(frozen=True)
class Plan:
    """The responses to draw, and the law that they must follow."""

    name: str
    prompts: Sequence[Prefix]  # token ids; all prompts get the same number of draws
    params: SamplingParams
    laws_after: LawsAfter
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
    """Draw and test responses: `draws`, and then as many as the standard's power takes, but at most `limit`.

    The number of draws depends on how much the scores vary, never on the scores of the tokens that were drawn: that
    would change the distribution of the statistics.

    Args:
        cells: number of cells that share the standard's level.
    """
    began, samples = time.perf_counter(), []
    faults: set[str] = set()
    scores: Strata | None = None
    wanted = min(draws, limit)
    while wanted:
        asked = plan.asked(wanted)
        prompts = [plan.prompts[i % len(plan.prompts)] for i in range(len(asked))]
        requests = [Request(str(i), *pair) for i, pair in enumerate(zip(prompts, asked, strict=True))]
        drawn = engine.submit(requests).collect()
        faults |= plan.check(drawn, asked)
        samples += drawn
        more = token_scores(tree_of(_pairs(drawn)), plan.laws_after)
        scores = more if scores is None else scores + more
        wanted = min(missing(scores, standard, cells, len(samples)), limit - len(samples))
    evidence = joint_law(tree_of(_pairs(samples)), plan.laws_after)
    return _result(plan.name, evidence, scores, samples, time.perf_counter() - began, tuple(sorted(faults)))


def missing(scores: Strata, standard: Standard, cells: int, draws: int) -> int:
    """Return how many more responses the standard's power takes, from the sums of `draws` responses."""
    if standard.power_of(scores, cells) >= standard.power:
        return 0
    factor = 1.0
    while standard.power_of(scores.times(factor), cells) < standard.power and factor < 1000:
        factor *= 1.02
    return int(draws * (factor * MARGIN - 1)) + 1


def _pairs(samples: Sequence[Sample]) -> list[tuple[Prefix, list[int]]]:
    return [(tuple(sample.prompt_ids), sample.response_ids) for sample in samples]


def _result(
    name: str, evidence: Evidence, scores: Strata, samples: list[Sample], seconds: float, faults: tuple[str, ...]
) -> CellResult:
    tokens = sum(len(sample.response_ids) for sample in samples)
    return CellResult(name, evidence, scores, len(samples), tokens, accept_length(samples), seconds, faults)
