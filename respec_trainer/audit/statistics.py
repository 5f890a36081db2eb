"""The statistics of an audit: chi-square tests of counts, and Holm's correction for many tests.

Sources: Pearson 1900 (chi-square); Holm 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, poisson

LEAST_EXPECTED = 5.0  # least expected draws of an outcome that is tested by itself


@dataclass(frozen=True)
class Evidence:
    """A chi-square statistic with the numbers behind it. Evidence of independent draws can be added."""

    statistic: float = 0.0
    df: int = 0
    draws: int = 0  # draws between several likely outcomes
    lone: int = 0  # draws where only one outcome is likely, so that only the number of rare outcomes is tested

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def p_value(self) -> float:
        return float(chi2.sf(self.statistic, self.df)) if self.df else 1.0


def multinomial(observed: np.ndarray, law: np.ndarray) -> tuple[Evidence, int, float]:
    """Test counts [V] of draws from one law [V].

    Returns the evidence of the common outcomes, which have enough expected draws, given that a draw was common; the
    number of draws of the rare outcomes; and its expectation. The last two, added over many laws, go into `rare`.
    """
    draws = int(observed.sum())
    common = draws * law >= LEAST_EXPECTED
    mass = float(law[common].sum())
    count = int(observed[common].sum())
    rest, rest_expected = draws - count, draws * max(0.0, 1.0 - mass)
    if common.sum() < 2 or not count:
        return Evidence(lone=draws if common.any() else 0), rest, rest_expected
    expected = count * law[common] / mass
    statistic = float(((observed[common] - expected) ** 2 / expected).sum())
    return Evidence(statistic, int(common.sum()) - 1, draws), rest, rest_expected


def rare(observed: int, expected: float) -> Evidence:
    """Test a count of many rare outcomes, which is nearly Poisson. If few are expected, only an excess counts."""
    if expected >= LEAST_EXPECTED:
        return Evidence((observed - expected) ** 2 / expected, 1)
    tail = float(poisson.sf(observed - 1, expected))
    return Evidence(float(chi2.isf(tail, 1)) if observed > expected else 0.0, 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: rejecting those below a level errs with at most that probability over all tests."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
