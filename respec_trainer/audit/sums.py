"""ScoreSums: sums of the scores of draws (scores.py), and the tests of them.

D, the sum of the X of all draws, has mean 0 and the covariance S, the sum of E_q[rho^2 a a'] with a = g(y) - E_p[g].
With rho = 1 this is the covariance of g under p; what rho adds is estimated from the draws without bias, as
E_q[rho a a'] = E_p[a a']. For many draws D' S^-1 D has a chi-square distribution with rank(S) degrees of freedom, also
if each law depends on the draws before it (the central limit theorem for martingales: Hall and Heyde 1980).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import chi2, ncx2

from respec_trainer.audit.statistics import Evidence

LEAST_VARIANCE = 50.0  # as that of 50 rare draws: with fewer, a sum is not nearly normal
# A ratio as large as the largest that was seen may also be one that was not drawn by chance. This many such draws are
# added to the variance. If k are missing, each an increment r, D is k r off, sqrt(k^2 / MISSING) standard deviations:
# 6 of these, a p-value of 1e-6, take k = 17, which chance leaves out with a probability of exp(-17).
MISSING = 8.0
TOLERANCE = 1e-8  # of eigenvalues of a correlation that count as 0
RATIO_TOLERANCE = 1e-3  # of the mean ratio: float32 log-probs are off by less


@dataclass(frozen=True)
class ScoreSums:
    """Sums over draws. Sums of parts can be added. F scores: the classes, likeliest tokens first, and the surprisal."""

    difference: np.ndarray  # [F] D
    expected: np.ndarray  # [F, F] sum of the covariances under p
    excess: np.ndarray  # [F, F] sum of (rho^2 - rho) a a'
    largest: np.ndarray  # [F] sum of (rho^2 - rho)^4; for the surprisal of ((rho^2 - rho) a^2)^4
    fourth: float  # sum of the fourth central moments of the surprisal under p
    ratio: float  # sum of rho over the certain draws, minus their probability
    ratio_square: float  # sum of the squares of the same
    draws: float
    reached: float  # expected draws among the certain tokens; without top_p and top_k as many as `draws`

    def __add__(self, other: ScoreSums) -> ScoreSums:
        return ScoreSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, factor: float) -> ScoreSums:
        """Return the sums that are expected of `factor` times as many draws."""
        return ScoreSums(*(factor * getattr(self, name) for name in self.__dataclass_fields__))

    @property
    def covariance(self) -> np.ndarray:
        """S [F, F], with the draws that may be missing. The root is a norm, at least as large as the largest one."""
        return self.expected + self.excess + MISSING * np.diag(self.largest**0.25)

    def groups(self) -> np.ndarray:
        """Return [G, F] which classes are tested as one, so that each of the G groups varies enough."""
        groups: list[np.ndarray] = []
        current = np.zeros(len(self.difference))
        for index in reversed(range(len(current) - 1)):
            current[index] = 1
            if current @ self.expected @ current >= LEAST_VARIANCE:
                groups.insert(0, current)
                current = np.zeros(len(current))
        if groups:
            groups[0] = groups[0] + current
        return np.array(groups).reshape(len(groups), len(current))

    def classes(self) -> Evidence:
        """Test the classes. They sum to 0, so one of them is left out."""
        return self._test(self.groups()[1:])

    def surprisal(self) -> Evidence:
        """Test the surprisal, by the square of z = D / sqrt(S), which is two-sided."""
        return self._test(self._surprisal())

    def both(self) -> Evidence:
        """Test classes and surprisal together."""
        return self._test(np.concatenate([self.groups()[1:], self._surprisal()]))

    def ratio_p_value(self) -> float:
        """Test that the ratios average 1, up to RATIO_TOLERANCE: that q is the law that was drawn from."""
        variance = self.ratio_square + MISSING * self.largest[0] ** 0.25
        if not math.isfinite(variance):
            return 0.0
        off = max(0.0, abs(self.ratio) - RATIO_TOLERANCE * self.draws)
        return math.erfc(off / math.sqrt(2 * variance)) if off else 1.0

    @property
    def mean_ratio(self) -> float:
        return 1 + self.ratio / self.draws if self.draws else 1.0

    @property
    def total_variation(self) -> float:
        """Mass that moved between classes, above that of chance; 0 if less."""
        groups = self.groups()
        chance = np.sqrt(2 / math.pi * np.diag(groups @ self.covariance @ groups.T))
        moved = 0.5 * float((np.abs(groups @ self.difference) - chance).sum())
        return max(0.0, moved) / self.reached if self.reached else 0.0

    def power(self, total_variation: float, level: float, df: int) -> float:
        """Return a lower bound of the probability that a test at `level` with `df` finds a law this wrong.

        The law moves the mass `total_variation` between groups of classes, the same way at all these draws. Then the
        sum of |E D| is 2 N total_variation for N draws. With the signs s of E D that is s' E D, and
        (s' E D)^2 <= (E D' S^-1 E D) (s' S s) by Cauchy-Schwarz. So the noncentrality is
        (2 N total_variation)^2 / max s' S s at least.
        """
        groups = self.groups()
        if len(groups) < 2 or not df:
            return 0.0
        covariance = groups @ self.covariance @ groups.T
        largest = max(float(np.array(s) @ covariance @ np.array(s)) for s in product((-1, 1), repeat=len(groups)))
        noncentrality = (2 * self.reached * total_variation) ** 2 / largest
        return float(ncx2.sf(chi2.isf(level, df), df, noncentrality))

    def _surprisal(self) -> np.ndarray:
        """Return [1, F] the score to test; [0, F] with too few rare draws for a sum that is nearly normal."""
        score = np.eye(len(self.difference))[-1:]
        return score if self.expected[-1, -1] ** 2 >= LEAST_VARIANCE * self.fourth > 0 else score[:0]

    def _test(self, scores: np.ndarray) -> Evidence:
        """Return the evidence of the K sums scores [K, F] of D."""
        if not len(scores):
            return Evidence(draws=self.draws)
        difference, covariance = scores @ self.difference, scores @ self.covariance @ scores.T
        if not np.isfinite([*difference, *covariance.flat]).all():
            return Evidence(math.inf, len(scores), self.draws)
        scale = np.sqrt(np.diag(covariance))
        correlation, z = covariance / np.outer(scale, scale), difference / scale
        df = int(np.linalg.matrix_rank(correlation, tol=TOLERANCE, hermitian=True))
        inverse = np.linalg.pinv(correlation, rcond=TOLERANCE, hermitian=True)
        return Evidence(float(z @ inverse @ z), df, self.draws)

    def state_dict(self) -> dict:
        """Return the sums as JSON data."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def of_state(cls, state: dict) -> ScoreSums:
        return cls(**{name: np.array(value) if isinstance(value, list) else value for name, value in state.items()})
