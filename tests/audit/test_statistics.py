"""audit/statistics.py against laws that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from respec_trainer.audit.statistics import ClassSums, Evidence, holm, multinomial, rare

LAW = np.array([0.5, 0.2, 0.2, 0.0999, 0.0001])


def draw(law, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(draws, law)


def test_chi_square_of_likely_outcomes_is_scipys():
    observed = draw(LAW, 1000, 0)
    evidence, others, others_expected = multinomial(observed, LAW)
    likely = LAW[:4] / LAW[:4].sum()
    expected = chisquare(observed[:4], observed[:4].sum() * likely)
    assert (evidence.statistic, evidence.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    assert (others, others_expected) == (observed[4], pytest.approx(0.1))


def test_p_values_of_the_right_law_are_uniform():
    p_values = []
    for seed in range(400):
        total, rest, rest_expected = Evidence(), 0, 0.0
        for node in range(20):
            evidence, others, expected = multinomial(draw(LAW, 500, 1000 * seed + node), LAW)
            total, rest, rest_expected = total + evidence, rest + others, rest_expected + expected
        p_values.append((total + rare(rest, rest_expected)).p_value)
    assert kstest(p_values, "uniform").pvalue > 1e-3


def test_the_power_promised_is_kept():
    """The wrong law is the hardest to detect at its distance: it differs in proportion to p."""
    tilt = np.array([0.02, 0.02, -0.02, -0.02])
    law = np.full(4, 0.25)
    wrong = law + 0.5 * tilt
    evidence, _, _ = multinomial(draw(law, 20_000, 0), law)
    promised = evidence.power(0.02, 0.01)
    found = [multinomial(draw(wrong, 20_000, seed), law)[0].p_value < 0.01 for seed in range(400)]
    assert promised > 0.9 and np.mean(found) >= promised - 3 * np.sqrt(promised * (1 - promised) / 400)


def test_where_one_outcome_is_likely_the_others_show_a_wrong_law():
    law, wrong = np.array([0.9999, 0.0001]), np.array([0.98, 0.02])
    evidence, others, expected = multinomial(draw(wrong, 2000, 1), law)
    assert (evidence.df, evidence.lone) == (0, 2000)
    total = evidence + rare(others, expected)
    assert total.p_value < 1e-12 and total.power(0.02, 1e-6) > 0.99
    evidence, others, expected = multinomial(draw(law, 2000, 1), law)
    assert (evidence + rare(others, expected)).p_value > 1e-3


def test_an_impossible_outcome_is_proof():
    evidence, others, expected = multinomial(np.array([500, 499, 1]), np.array([0.5, 0.5, 0.0]))
    assert (evidence + rare(others, expected)).p_value == 0


def test_too_few_rare_outcomes_show_where_many_are_expected():
    assert rare(100, 100.0).p_value == 1 and rare(50, 100.0).p_value < 1e-5 and rare(0, 3.0).p_value == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("bias", [0.0, 0.12])
def test_classes_of_laws_that_all_differ(bias):
    """Sum draws from different laws, after moving some of their mass to the first class."""
    generator = np.random.default_rng(5)
    p_values = []
    for _ in range(200):
        masses = generator.dirichlet([3, 1, 0.5, 0.2], 2000)
        wrong = (1 - bias) * masses + bias * np.eye(4)[0]
        drawn = (generator.random((2000, 1)) > wrong.cumsum(1)[:, :-1]).sum(1)
        half = ClassSums.of(drawn[:700], masses[:700]), ClassSums.of(drawn[700:], masses[700:])
        evidence = (half[0] + half[1]).evidence()
        assert evidence.df == 3
        p_values.append(evidence.p_value)
    assert kstest(p_values, "uniform").pvalue > 1e-3 if not bias else np.median(p_values) < 1e-3


def test_nothing_drawn_proves_nothing():
    nothing = ClassSums.of(np.zeros(0, dtype=int), np.zeros((0, 3))).evidence()
    assert (nothing.p_value, nothing.power(0.02, 0.01), nothing.total_variation) == (1.0, 0.0, 0.0)
