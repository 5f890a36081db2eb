"""Measure the error of fitted costs on cells that were held out of the fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from respec_trainer.speculation.acceptance import ranks, tokens_per_cycle
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.profiling.fit import better, check_enough, fit_forms
from respec_trainer.speculation.profiling.profile import Cell, Profile
from respec_trainer.speculation.shape import OFF

FOLDS = 5
# Acceptance of a depth at which the gain of speculation is judged: from a poor drafter to a good one.
LEVELS = (0.3, 0.5, 0.7, 0.85)


@dataclass(frozen=True)
class Quality:
    """The errors of a model on cells that it was not fitted to."""

    mape: float  # mean relative error of the time of a decode step or a cycle
    worst: float  # the largest relative error
    sign_accuracy: float  # share of (cell, acceptance) cases with a correct prediction of whether speculation pays
    settled_accuracy: float  # the same among settled cases: those in which all repeats agree
    settled: float  # share of settled cases
    cells: int

    def __str__(self) -> str:
        return (
            f"held-out error {self.mape:.1%} on average, {self.worst:.1%} at worst; right about whether speculation "
            f"pays in {self.sign_accuracy:.1%} of cases, in {self.settled_accuracy:.1%} of the {self.settled:.0%} in "
            f"which all repeats agree ({self.cells} cells)"
        )


def held_out(profile: Profile) -> Quality:
    """Leave out each fifth of the (batch, context) points in turn, with all their shapes, and predict their times.

    The form of the model is chosen without them too.

    The gain of a cell is judged at each of LEVELS, an acceptance that is the same at all depths; for a tree `ranks`
    gives the other branches. Raises ConfigError if the profile has too few cells.
    """
    check_enough(profile.cells)
    cells = [cell for cell in profile.cells if "plain" in cell.times or "verify" in cell.times]
    points = sorted({(cell.batch, cell.context) for cell in cells})
    errors, signs = [], []
    for fold in range(FOLDS):
        left = set(points[fold::FOLDS])
        kept = [cell for cell in profile.cells if (cell.batch, cell.context) not in left]
        model = better(*fit_forms(kept, profile.graph_sizes)).costs
        for cell in (cell for cell in cells if (cell.batch, cell.context) in left):
            errors.append(abs(model.cycle_seconds(cell.shape, cell.batch, cell.context) / cell.seconds - 1))
            signs += _signs(model, profile, cell) if cell.shape != OFF else []
    right, settled = np.array(signs, dtype=bool).T
    shares = [float(np.mean(each)) if len(each) else float("nan") for each in (right, right[settled], settled)]
    return Quality(float(np.mean(errors)), max(errors), *shares, len(errors))


def _signs(model: CostModel, profile: Profile, cell: Cell) -> list[tuple[bool, bool]]:
    """(the model is right, the repeats agree) at each level. Repeats measure both shapes in turns, so they pair up."""
    plain = profile.cell(cell.batch, cell.context, OFF)
    measured, repeats = plain.seconds / cell.seconds, list(zip(plain.repeats, cell.repeats, strict=False))
    predicted = model.step_seconds(cell.batch, cell.context)
    predicted /= model.cycle_seconds(cell.shape, cell.batch, cell.context)
    tokens = [tokens_per_cycle(cell.shape, [ranks(level, cell.shape.topk)]) for level in LEVELS]
    return [
        ((gain * measured > 1) == (gain * predicted > 1), len({gain * off > on for off, on in repeats}) == 1)
        for gain in tokens
    ]
