"""The figure of rollouts over time: active batch, draft steps, accept length and speed-up, as in Fig 6 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from respec_trainer.telemetry.figures import BLUE, DARK, VERMILION, bare, figure_of
from respec_trainer.telemetry.timeline import Timeline, edges_of, ratio_by_time, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 60  # equal parts of a rollout's time
HEIGHTS = {"active batch": 1.2, "draft steps": 0.8, "accept length": 1.0, "speed-up": 1.2}


def phase_figure(phases: Mapping[int, Sequence[Timeline]]) -> Figure:
    """Draw rollouts, a column each: batch, draft steps, accept length and speed-up over time.

    If there are several engines, the one that took longest is shown. `phases` maps the numbers of at least one step to
    timelines, with at least one decode batch in each step.
    """
    lines = {step: longest(timelines) for step, timelines in phases.items()}
    sped = any(not np.isnan(line.plain).all() or (line.log.predicted > 0).any() for line in lines.values())
    heights = [height for name, height in HEIGHTS.items() if sped or name != "speed-up"]
    figure = figure_of(max(6.0, 4.4 * len(lines)), 2.1 * sum(heights) + 0.6)
    grid = figure.subplots(
        len(heights), len(lines), sharex="col", sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for column, (step, line) in enumerate(lines.items()):
        engines = f", the longest of {len(phases[step])} engines" if len(phases[step]) > 1 else ""
        _phase(grid[:, column], line, labels=column == 0)
        grid[0, column].set_title(f"iteration {step}{engines}")
        grid[-1, column].set_xlim(0.0, line.times[-1])
        grid[-1, column].set_xlabel("seconds since the rollout began")
    # After all plots: setting a limit ends the automatic scaling of the whole row.
    for row, low in ((0, 0.0), (1, -0.3), (2, 0.9)):
        grid[row, 0].set_ylim(bottom=low)
    return figure


def longest(timelines: Sequence[Timeline]) -> Timeline:
    """The timeline of the engine that took longest, among those that decoded."""
    return max((line for line in timelines if line.decodes.any()), key=lambda line: line.times[-1])


def _phase(axes: Sequence[Axes], line: Timeline, labels: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    log, decodes = line.log, line.decodes
    time = np.append(line.times[:-1][decodes], line.times[-1])
    for each, column in zip(axes, (log.batch, log.steps), strict=False):
        values = np.append(column[decodes], column[decodes][-1])  # the last value, until its batch ends
        each.step(time, values, where="post", color=BLUE, linewidth=1.1)
        each.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    drafted = decodes & (log.steps > 0)
    _stairs(axes[2], line, ratio_by_time(line, drafted, log.tokens, log.batch, BINS), BLUE)
    if len(axes) > 3:
        _speedups(axes[3], line)
    _shade_off(axes, line)
    for each in axes:
        bare(each)
    if labels:
        units = ("sequences", "drafts a pass", "tokens a pass", "times")
        for each, name, unit in zip(axes, HEIGHTS, units, strict=False):
            each.set_ylabel(f"{name}\n{unit}")
        if len(axes) > 3:
            axes[3].legend(loc="best", frameon=False)


def _speedups(axes: Axes, line: Timeline) -> None:
    """Draw predicted and achieved speed-up as ratios by bin, so that both are over the same time."""
    known = line.decodes & (line.log.predicted > 0)
    predicted = ratio_by_time(line, known, line.log.predicted * line.seconds, line.seconds, BINS)
    achieved = ratio_by_time(line, line.decodes, line.earned, line.seconds, BINS)
    axes.axhline(1.0, color=DARK, linewidth=1, zorder=1)
    _stairs(axes, line, achieved, BLUE, label="achieved")
    _stairs(axes, line, predicted, VERMILION, label="predicted", linestyle="--")


def _stairs(axes: Axes, line: Timeline, values: np.ndarray, color: str, **look: str) -> None:
    axes.stairs(values, edges_of(line, BINS), baseline=None, color=color, linewidth=1.5, **look)


def _shade_off(axes: Sequence[Axes], line: Timeline) -> None:
    """Shade the bins in which most of the decode time was without speculation."""
    off = ratio_by_time(line, line.decodes, line.seconds * (line.log.steps == 0), line.seconds, BINS)
    for began, ended in spans(np.nan_to_num(off) > 0.5, edges_of(line, BINS)):
        for each in axes:
            each.axvspan(began, ended, color="#EEEEEE", linewidth=0, zorder=-1)
