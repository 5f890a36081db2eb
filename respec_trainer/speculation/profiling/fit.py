"""Fit the cost model to a profile. `held_out.py` measures the error of the fit.

Both forms of the cost model are fitted, attention within the roofline and apart from it (`cost.py`), and the better one
is taken for all pieces: they run on one device. Both have equally many terms, so the criterion is the Bayesian
information criterion without its constant part: n log(cost / n), summed over the pieces, where n is the number of a
piece's measurements and cost is what the fit left of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.cost import CostModel, Piece, Terms, Work, seconds
from respec_trainer.speculation.profiling.profile import CYCLE, Cell, Profile

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
EVIDENCE = 10.0  # by which the second form must be better to be taken: very strong evidence (Kass and Raftery 1995)
LEAST = 1e-12  # of cost / n: below this, differences are rounding

Measured = tuple[Work, float]  # work, and the seconds it took


class Fit(NamedTuple):
    """A fitted cost model and its criterion; a smaller one is better."""

    costs: CostModel
    criterion: float


def fit_costs(profile: Profile) -> CostModel:
    """Fit a cost model to the profile. Raises ConfigError if it has too few cells, naming what is missing."""
    check_enough(profile.cells)
    return better(*fit_forms(profile.cells, profile.graph_sizes)).costs


def fit_forms(cells: Iterable[Cell], graphs: Sequence[int] = ()) -> tuple[Fit, Fit]:
    """Fit both forms to the cells: attention within the roofline, and apart from it."""
    samples = _samples(cells, graphs)
    return tuple(_fit_form(samples, graphs, apart) for apart in (0.0, 1.0))


def better(within: Fit, apart: Fit) -> Fit:
    """Return the form to use: `apart` only on strong evidence, because most CPUs compute and read in turns anyway."""
    return apart if apart.criterion < within.criterion - EVIDENCE else within


def describe_forms(within: Fit, apart: Fit) -> str:
    """Return a sentence on the form that was taken, and by how much it is better."""
    taken = "apart from" if better(within, apart) is apart else "within"
    ahead = within.criterion - apart.criterion
    return f"attention counts {taken} the roofline: apart is better by {ahead:+.0f}, of {EVIDENCE:.0f} that are needed"


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


def _fit_form(samples: dict[Piece, list[Measured]], graphs: Sequence[int], apart: float) -> Fit:
    pieces, criterion = {}, 0.0
    for piece, measured in samples.items():
        pieces[piece], cost = _fit_piece(piece, measured, apart)
        criterion += len(measured) * math.log(max(cost / len(measured), LEAST))
    return Fit(CostModel(pieces, tuple(graphs)), criterion)


def _samples(cells: Iterable[Cell], graphs: Sequence[int]) -> dict[Piece, list[Measured]]:
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
            samples[piece].append((Work.of(piece, cell.shape, cell.batch, cell.context, graphs), taken))
    return samples


def _fit_piece(piece: Piece, samples: list[Measured], apart: float) -> tuple[Terms, float]:
    """Least squares of relative errors, robust to outliers, for each value of OVERLAPS; return the best, and its cost.

    A piece without overlapping terms has one form only.
    """
    work = Work(*np.array([work for work, _ in samples], dtype=float).T)
    taken = np.array([taken for _, taken in samples])
    used = np.array(TERMS[piece])
    linear = np.stack([seconds((*unit, 1.0, 0.0), work) * np.ones(len(taken)) for unit in np.eye(6)[used]], 1)
    largest = (linear / taken[:, None]).max(0)
    kept = largest > 0  # drop terms without any work, such as a draft's passes if all cells have steps=1
    used, scale = used[kept], 1 / largest[kept]  # each term in units of its largest possible value
    start, _ = nnls(linear[:, kept] * scale / taken[:, None], np.ones(len(taken)))
    overlaps = OVERLAPS if {WEIGHTS, TOKEN} <= set(used.tolist()) else OVERLAPS[:1]

    def terms(x: np.ndarray, overlap: float) -> np.ndarray:
        full = np.zeros(8)
        full[used], full[6:] = x * scale, (overlap, apart if overlap > 1 else 0.0)
        return full

    def errors(x: np.ndarray, overlap: float) -> np.ndarray:
        return seconds(terms(x, overlap), work) / taken - 1

    best = None
    for overlap in overlaps:
        # Start inside the bounds, where the gradient of every term is not 0.
        found = least_squares(errors, start + 0.01, bounds=(0, np.inf), loss="soft_l1", f_scale=SOFT, args=(overlap,))
        if best is None or found.cost < 0.999 * best[0]:
            best = found.cost, terms(found.x, overlap)
    return Terms(*best[1].tolist()), best[0]
