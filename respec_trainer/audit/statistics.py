"""The statistics of an audit: chi-square tests, their power, and Holm's correction for many of them.

Sources: Pearson 1900 (chi-square); Holm 1979; the power of the test from the noncentral chi-square law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, ncx2, poisson

LEAST_EXPECTED = 5.0  # least expected draws of an outcome that is tested by itself


@dataclass(frozen=True)
class Evidence:
    """A chi-square statistic with the numbers behind it. Evidence of independent draws can be added."""

    statistic: float = 0.0
    df: int = 0
    draws: int = 0  # draws between several likely outcomes
    distance: float = 0.0  # sum over these draws of the observed total variation
    chance: float = 0.0  # sum over these draws of the mean total variation of draws from the right law
    lone: int = 0  # draws where only one outcome is likely: every other law gives more to the rare outcomes
    rare: float = 0.0  # expected rare outcomes of all draws

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def p_value(self) -> float:
        return float(chi2.sf(self.statistic, self.df)) if self.df else 1.0

    @property
    def total_variation(self) -> float:
        """Mean total variation over draws, above that of chance; 0 if less was observed than by chance."""
        return max(0.0, self.distance - self.chance) / self.draws if self.draws else 0.0

    def power(self, total_variation: float, level: float) -> float:
        """Return a lower bound of the probability that a test at `level` detects a law this wrong at every draw.

        The noncentrality of n draws from a law q is n sum (q - p)^2 / p >= n (sum |q - p|)^2 = 4 n TV^2
        (Cauchy-Schwarz). If only one outcome is likely, a law this wrong adds its total variation to the rare outcomes,
        reduced by the probability that they had. The power grows with the noncentrality, so this is a lower bound.
        """
        if not self.df:
            return 0.0
        more = max(0.0, self.lone * total_variation - self.rare)
        noncentrality = 4 * self.draws * total_variation**2 + more**2 / max(self.rare, LEAST_EXPECTED)
        return float(ncx2.sf(chi2.isf(level, self.df), self.df, noncentrality))


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
    p, seen = law[common] / mass, observed[common]
    statistic = float(((seen - count * p) ** 2 / (count * p)).sum())
    distance = 0.5 * float(np.abs(seen - count * p).sum())
    chance = 0.5 * float(np.sqrt(2 / math.pi * count * p * (1 - p)).sum())
    return Evidence(statistic, int(common.sum()) - 1, draws, distance, chance), rest, rest_expected


def rare(observed: int, expected: float) -> Evidence:
    """Test a count of many rare outcomes, which is nearly Poisson. If few are expected, only an excess counts."""
    if expected >= LEAST_EXPECTED:
        statistic = (observed - expected) ** 2 / expected
    else:
        tail = float(poisson.sf(observed - 1, expected))
        statistic = float(chi2.isf(tail, 1)) if observed > expected else 0.0
    return Evidence(statistic, 1, rare=expected)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: rejecting those below a level errs with at most that probability over all tests."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class ClassSums:
    """Sums over draws with different laws, by classes that are fixed before each draw. Sums of parts can be added."""

    seen: np.ndarray  # [C] draws in each class
    expected: np.ndarray  # [C] sum of the probabilities p [C] of each class
    products: np.ndarray  # [C, C] sum of p p'
    draws: int

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @classmethod
    def of(cls, drawn: np.ndarray, masses: np.ndarray) -> ClassSums:
        """Sum over T draws. drawn: [T] the class of each. masses: [T, C] float64, each row a law over the classes."""
        seen = np.bincount(drawn, minlength=masses.shape[1]).astype(float)
        return cls(seen, masses.sum(0), masses.T @ masses, len(drawn))

    def evidence(self) -> Evidence:
        """Return the evidence of the chi-square statistic D' S^-1 D.

        D = seen - expected, and S is the sum of the covariances diag(p) - p p'. For many draws the statistic has
        rank(S) degrees of freedom, also if each law depends on the draws before it (the central limit theorem for
        martingales). Errors of the laws that cancel over the draws, such as rounding, cancel in D.
        """
        covariance = np.diag(self.expected) - self.products
        used = np.diag(covariance) >= LEAST_EXPECTED
        if used.sum() < 1:
            return Evidence()
        difference, covariance = (self.seen - self.expected)[used], covariance[np.ix_(used, used)]
        tolerance = 1e-8 * float(covariance.max())
        df = int(np.linalg.matrix_rank(covariance, tol=tolerance, hermitian=True))
        inverse = np.linalg.pinv(covariance, rcond=1e-8, hermitian=True)
        chance = 0.5 * float(np.sqrt(2 / math.pi * np.diag(covariance)).sum())
        distance = 0.5 * float(np.abs(difference).sum())
        return Evidence(float(difference @ inverse @ difference), df, self.draws, distance, chance)
