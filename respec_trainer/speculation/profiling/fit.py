"""Fit the cost model to a profile, and measure its error on held-out cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.acceptance import ranks, tokens_per_cycle
from respec_trainer.speculation.cost import CostModel, Piece, Terms, Work, seconds
from respec_trainer.speculation.profiling.profile import CYCLE, Cell, Profile
from respec_trainer.speculation.shape import OFF

# Terms of each piece, by their index in Terms. The others are 0, because the piece has no such work or the profile
# cannot separate them.
FIXED, EACH, WEIGHTS, KV, TOKEN, PAIR = range(6)
TERMS: dict[Piece, tuple[int, ...]] = {
    "plain": (FIXED, WEIGHTS, KV, TOKEN),
    "draft": (FIXED, EACH, WEIGHTS, KV, TOKEN, PAIR),
    "verify": (FIXED, EACH, WEIGHTS, KV, TOKEN, PAIR),
    "extend": (FIXED, EACH, WEIGHTS, KV, TOKEN, PAIR),
    "rest": (FIXED, EACH, TOKEN),
    "catch_up": (FIXED, EACH, KV, TOKEN, PAIR),
    "prefill": (FIXED, EACH, TOKEN, PAIR),
    "switch": (FIXED,),
}
OVERLAPS = (1.0, 2.0, 4.0, 8.0)
SOFT = 0.05  # relative residuals beyond this count as outliers, with less weight
BATCHES, CONTEXTS, STEPS = 3, 2, 2  # numbers of different values needed to separate the terms
FOLDS = 5
# Acceptance of a depth at which `held_out` judges the gain of speculation: from a poor drafter to a good one.
LEVELS = (0.3, 0.5, 0.7, 0.85)

Measured = tuple[Work, float]  # work, and the seconds it took


def fit_costs(profile: Profile) -> CostModel:
    """Fit a cost model to the profile. Raises ConfigError if it has too few cells, naming what is missing."""
    check_enough(profile.cells)
    return _fit(profile.cells)


def check_enough(cells: Sequence[Cell]) -> None:
    plain, speculative = [c for c in cells if "plain" in c.times], [c for c in cells if "verify" in c.times]
    groups = {"plain cells (steps=0)": plain, "cells with steps >= 1": speculative}
    for part in ("catch_up", "prefill"):
        if having := [c for c in cells if part in c.times]:
            groups[f"cells with {part}"] = having
    missing = []
    for name, group in groups.items():
        missing += _too_few(f"{name}: batch", {c.batch for c in group}, BATCHES)
        missing += _too_few(f"{name}: context", {c.context for c in group}, CONTEXTS)
    missing += _too_few("cells with steps >= 1: steps", {c.shape.steps for c in speculative}, STEPS)
    bare = {(c.batch, c.context) for c in speculative} - {(c.batch, c.context) for c in plain}
    missing += [f"  plain cell at batch={b}, context={c}, which its speculative cells need" for b, c in sorted(bare)]
    if missing:
        raise ConfigError("\n".join(["too few cells to fit what speculation costs; missing:", *missing]))


def _too_few(name: str, values: set[int], needed: int) -> list[str]:
    return [f"  {name}: {needed} different values needed, has {sorted(values)}"] if len(values) < needed else []


def _fit(cells: Iterable[Cell]) -> CostModel:
    return CostModel({piece: _fit_piece(piece, samples) for piece, samples in _samples(cells).items()})


def _samples(cells: Iterable[Cell]) -> dict[Piece, list[Measured]]:
    """Every piece's measurements. "extend" without speculation is the same drafter pass over fewer tokens."""
    samples = defaultdict(list)
    for cell in cells:
        times = {part: timing.median for part, timing in cell.times.items()}
        whole, resume = times.pop("cycle", None), times.pop("resume", None)
        if resume is not None:
            samples["catch_up"].append((Work.reading(cell.batch, cell.context, 1), resume))
        if whole is not None and "verify" in times:  # a tree's cycle may have been measured from outside
            # At least a small positive time: the parts may come from other repeats than the whole.
            times["rest"] = max(whole - sum(times[part] for part in CYCLE), 1e-3 * whole)
        for piece, taken in times.items():
            samples[piece].append((Work.of(piece, cell.shape, cell.batch, cell.context), taken))
    return samples


def _fit_piece(piece: Piece, samples: list[Measured]) -> Terms:
    """Least squares of relative errors, robust to outliers, for each value of OVERLAPS; return the best fit."""
    work = Work(*np.array([work for work, _ in samples], dtype=float).T)
    taken = np.array([taken for _, taken in samples])
    used = np.array(TERMS[piece])
    linear = np.stack([seconds((*unit, 1.0), work) * np.ones(len(taken)) for unit in np.eye(6)[used]], 1)
    largest = (linear / taken[:, None]).max(0)
    kept = largest > 0  # drop terms without any work, such as a draft's passes if all cells have steps=1
    used, scale = used[kept], 1 / largest[kept]  # each term in units of its largest possible value
    start, _ = nnls(linear[:, kept] * scale / taken[:, None], np.ones(len(taken)))
    overlaps = OVERLAPS if {WEIGHTS, TOKEN} <= set(used.tolist()) else OVERLAPS[:1]

    def terms(x: np.ndarray, overlap: float) -> np.ndarray:
        full = np.zeros(7)
        full[used], full[6] = x * scale, overlap
        return full

    def errors(x: np.ndarray, overlap: float) -> np.ndarray:
        return seconds(terms(x, overlap), work) / taken - 1

    best = None
    for overlap in overlaps:
        # Start inside the bounds, where the gradient of every term is not 0.
        found = least_squares(errors, start + 0.01, bounds=(0, np.inf), loss="soft_l1", f_scale=SOFT, args=(overlap,))
        if best is None or found.cost < 0.999 * best[0]:
            best = found.cost, terms(found.x, overlap)
    return Terms(*best[1].tolist())


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

    The gain of a cell is judged at each of LEVELS, an acceptance that is the same at all depths; for a tree `ranks`
    gives the other branches. Raises ConfigError if the profile has too few cells.
    """
    check_enough(profile.cells)
    cells = [cell for cell in profile.cells if "plain" in cell.times or "verify" in cell.times]
    points = sorted({(cell.batch, cell.context) for cell in cells})
    errors, signs = [], []
    for fold in range(FOLDS):
        left = set(points[fold::FOLDS])
        model = _fit([cell for cell in profile.cells if (cell.batch, cell.context) not in left])
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
