"""audit/draws.py: how many responses are drawn, of what, and what is done with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.audit_power import STANDARD, TableEngine
from respec_trainer.audit.draws import MARGIN, Plan, examine, missing
from respec_trainer.audit.law import laws
from respec_trainer.audit.scores import Strata
from respec_trainer.audit.sums import ScoreSums
from respec_trainer.rollout.sample import SamplingParams

VOCAB, PROMPTS = 8, [(1,), (9, 2), (3,)]
PARAMS = SamplingParams(24)
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


class Engine(TableEngine):
    """Keeps what it was asked, over all rounds."""

    def __init__(self, table: torch.Tensor, seed: int = 0):
        super().__init__(table, seed)
        self.rounds: list[list] = []

    def submit(self, requests):
        self.rounds.append(list(requests))
        return super().submit(requests)


def plan(**more) -> Plan:
    return Plan("cell", PROMPTS, PARAMS, lambda prefixes: laws(LOGITS[[p[-1] for p in prefixes]], PARAMS), **more)


def sums_with(uncertain: float, variance: float) -> Strata:
    covariance = variance * np.array([[2, -1, -1, 0], [-1, 2, -1, 0], [-1, -1, 2, 0], [0, 0, 0, 1.0]])
    nothing = ScoreSums(np.zeros(4), np.zeros((4, 4)), np.zeros((4, 4)), np.zeros(4), 1.0, 0.0, 0.0, 0.0, 0.0)
    return Strata(replace(nothing, expected=covariance, draws=uncertain, reached=uncertain), nothing)


def test_as_many_are_drawn_as_the_power_takes_and_no_more():
    result = examine(engine := Engine(laws(LOGITS, PARAMS).probs), plan(), STANDARD, 22, limit=20_000, draws=300)
    first, second = map(len, engine.rounds)
    assert first == 300 and result.draws == first + second
    assert STANDARD.power_of(result.scores, 22) >= 0.99
    fewer = result.scores.times(0.85 / MARGIN)
    assert STANDARD.power_of(fewer, 22) < 0.99
    assert result.tokens == result.scores.whole.draws and min(result.p_values) > 1e-4
    enough = examine(engine := Engine(laws(LOGITS, PARAMS).probs), plan(), STANDARD, 1, limit=20_000, draws=9000)
    assert list(map(len, engine.rounds)) == [9000] and enough.draws == 9000


def test_the_limit_is_kept():
    result = examine(engine := Engine(laws(LOGITS, PARAMS).probs), plan(), STANDARD, 22, limit=400, draws=300)
    assert list(map(len, engine.rounds)) == [300, 100] and result.draws == 400
    assert examine(Engine(laws(LOGITS, PARAMS).probs), plan(), STANDARD, 22, limit=200, draws=300).draws == 200


def test_the_scores_of_what_was_drawn_change_no_number_of_draws():
    some = sums_with(5000.0, 900.0)
    wanted = missing(some, STANDARD, 22, 1000)
    drawn = replace(some, uncertain=replace(some.uncertain, difference=np.array([900.0, -900, 0, 50])))
    assert wanted > 0 and missing(drawn, STANDARD, 22, 1000) == wanted


@pytest.mark.parametrize("cells", [1, 22])
def test_what_is_missing_brings_the_power_to_the_standard(cells):
    some = sums_with(5000.0, 900.0)
    more = missing(some, STANDARD, cells, 1000)
    assert STANDARD.power_of(some.times(1 + more / 1000), cells) >= 0.99
    assert STANDARD.power_of(some.times(0.92 * (1 + more / 1000)), cells) < 0.99
    assert STANDARD.power_of(some.times((1 + more / 1000) / 1.04), cells) >= 0.99, "no margin"
    assert missing(some.times(1 + more / 1000), STANDARD, cells, 1000) == 0
    nothing = sums_with(0.0, 900.0)
    assert missing(nothing, STANDARD, cells, 1000) > 100_000


def test_every_prompt_gets_every_limit():
    asked = plan(limits=(3, 8, 13)).asked(18)
    pairs = Counter((PROMPTS[i % 3], params.max_new_tokens) for i, params in enumerate(asked))
    assert set(pairs.values()) == {2} and len(pairs) == 9
    assert {params.max_new_tokens for params in plan().asked(5)} == {24}


def test_faults_of_every_round_are_kept():
    rounds = []

    def check(samples, asked):
        rounds.append(len(samples))
        assert len(samples) == len(asked)
        return {f"round {len(rounds)}"}

    table = laws(LOGITS, PARAMS).probs
    result = examine(Engine(table), plan(check=check), STANDARD, 22, limit=400, draws=300)
    assert result.faults == ("round 1", "round 2")
