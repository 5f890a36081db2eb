"""audit/statistics.py against laws that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, chisquare, kstest, poisson

from respec_trainer.audit.statistics import Evidence, holm, multinomial, rare

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


def test_where_one_outcome_is_likely_the_others_show_a_wrong_law():
    law, wrong = np.array([0.9999, 0.0001]), np.array([0.98, 0.02])
    evidence, others, expected = multinomial(draw(wrong, 2000, 1), law)
    assert (evidence.df, evidence.lone) == (0, 2000)
    assert (evidence + rare(others, expected)).p_value < 1e-12
    evidence, others, expected = multinomial(draw(law, 2000, 1), law)
    assert (evidence + rare(others, expected)).p_value > 1e-3


def test_an_impossible_outcome_is_proof():
    evidence, others, expected = multinomial(np.array([500, 499, 1]), np.array([0.5, 0.5, 0.0]))
    assert (evidence + rare(others, expected)).p_value == 0


def test_evidence_adds_up():
    assert Evidence(1.0, 2, 3, 4) + Evidence(10.0, 20, 30, 40) == Evidence(11.0, 22, 33, 44)
    assert Evidence().p_value == 1.0


@pytest.mark.parametrize("observed", [4, 7])
def test_an_excess_of_few_rare_outcomes_has_the_p_value_of_poisson(observed):
    assert rare(observed, 2.0).p_value == pytest.approx(poisson.sf(observed - 1, 2.0))


def test_many_rare_outcomes_have_the_p_value_of_chi_square():
    assert rare(19, 10.0).p_value == pytest.approx(chi2.sf(81 / 10, 1)) and rare(19, 10.0).df == 1


def test_an_outcome_with_five_expected_draws_is_tested_by_itself():
    law = np.array([0.5, 0.45, 0.05])
    assert multinomial(np.array([50, 45, 5]), law)[0].df == 2
    evidence, others, expected = multinomial(np.array([48, 46, 5]), law)
    assert (evidence.df, others, expected) == (1, 5, pytest.approx(99 * 0.05))


def test_too_few_rare_outcomes_show_where_many_are_expected():
    assert rare(100, 100.0).p_value == 1 and rare(50, 100.0).p_value < 1e-5 and rare(0, 3.0).p_value == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.02, 0.01, 0.02, 0.5]) == pytest.approx([0.06, 0.04, 0.06, 0.5])
