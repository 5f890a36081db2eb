"""audit/report.py: verdicts over all tests of all cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import chi2, ncx2, norm

from respec_trainer.audit.report import TESTS, CellResult, Standard, judge, table
from respec_trainer.audit.scores import Strata
from respec_trainer.audit.statistics import Evidence
from respec_trainer.audit.sums import ScoreSums

STANDARD = Standard()


def result(tree: float = 0.5, classes: float = 0.5, surprisal: float = 0.5, uncertain: float = 80_000.0, **more):
    """A cell whose tests have these p-values. It has three classes, and the surprisal does not depend on them."""
    unit = np.sqrt(chi2.isf(classes, 2) * 2 * 5000)  # D = (0, d, -d) has the statistic d^2 / (2 * 5000)
    covariance = 5000 * np.array([[2, -1, -1, 0], [-1, 2, -1, 0], [-1, -1, 2, 0], [0, 0, 0, 1.0]])
    difference = np.array([-0.0, unit, -unit, 0]) / np.sqrt(2 / 3)
    difference[3] = norm.isf(surprisal / 2) * np.sqrt(5000)
    scale = difference[1:3] @ np.linalg.inv(covariance[1:3, 1:3]) @ difference[1:3]
    difference[:3] *= np.sqrt(chi2.isf(classes, 2) / scale) if scale else 1
    scores = ScoreSums(difference, covariance, np.zeros((4, 4)), np.zeros(4), 1.0, 0.0, 0.0, 1e5, uncertain)
    strata = Strata(scores, ScoreSums(*(0 * part for part in vars(scores).values())))
    return CellResult("cell", Evidence(chi2.isf(tree, 7), 7), strata, 4096, 60_000, 2.5, 10.0, **more)


def test_a_cell_has_three_p_values():
    assert TESTS == ("tree", "classes", "surprisal")
    assert result(0.1, 0.2, 0.3).p_values == pytest.approx((0.1, 0.2, 0.3))


@pytest.mark.parametrize("which", range(3))
def test_each_test_fails_a_cell_at_holms_level(which):
    """The smallest p-value of two cells with three tests each is multiplied by six."""

    def cells(p):
        return [result(), result(*[p if test == which else 0.5 for test in range(3)])]

    right, wrong = judge(cells(0.0016), STANDARD)
    assert wrong.adjusted == pytest.approx(6 * 0.0016) and wrong.refuted and not wrong.passed
    assert right.passed and not right.refuted and "FAIL" in wrong.mark and "PASS" in right.mark
    _, right = judge(cells(0.0018), STANDARD)
    assert right.passed and right.adjusted == pytest.approx(6 * 0.0018)


def test_holms_factor_is_that_of_all_tests_of_all_cells():
    first, second = judge([result(classes=1e-4, tree=3e-4), result(surprisal=0.0019)], STANDARD)
    assert first.adjusted == pytest.approx(6e-4) and second.adjusted == pytest.approx(4 * 0.0019)


def test_a_cell_without_power_fails_and_says_so():
    few = judge([result(uncertain=15_000.0)], STANDARD)[0]
    assert few.power < 0.99 and not few.passed and not few.refuted and "too few draws" in few.mark
    assert judge([result()], STANDARD)[0].power > 0.99


def test_power_is_of_the_classes_at_the_lowest_level():
    some = result(uncertain=25_000.0).scores
    largest = 4 * 2 * 5000  # the signs (1, -1, -1) have 4 times the variance of the first class
    expected = ncx2.sf(chi2.isf(0.01 / (22 * 3), 2), 2, (2 * 25_000 * 0.02) ** 2 / largest)
    assert STANDARD.power_of(some, 22) == pytest.approx(expected) and 0.1 < expected < 0.999
    assert replace(STANDARD, total_variation=0.03).power_of(some, 22) > expected


def test_a_fault_fails_a_cell():
    verdict = judge([result(faults=("went on after a stop",))], STANDARD)[0]
    assert not verdict.passed and verdict.row()["faults"] == ["went on after a stop"]


def test_the_row_and_the_table_show_every_test():
    verdicts = judge([result(0.11, 0.22, 0.33), result(faults=("too long",))], STANDARD)
    row = verdicts[0].row()
    assert (row["p_tree"], row["p_classes"], row["p_surprisal"]) == pytest.approx((0.11, 0.22, 0.33))
    assert row["uncertain_tokens"] == 80_000 and row["draws"] == 4096 and row["passed"] and row["df"] == 7
    console = Console(width=140, record=True)
    console.print(table(verdicts, STANDARD))
    text = console.export_text()
    assert all(word in text for word in ("0.11", "0.22", "0.33", "80,000", "4,096", "too long", "PASS", "FAIL", "2.50"))
