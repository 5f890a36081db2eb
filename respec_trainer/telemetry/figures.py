"""Figures of a run: its metrics over its steps. Colours are those of Okabe and Ito, safe for colour-blind readers.

matplotlib is imported only when a figure is drawn, because the import would slow the start of every run.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB"
DARK = "#777777"
# Phases that follow each other. `learn` mostly overlaps with `generate`; its remaining time is part of "other".
PHASES = {
    "generate": BLUE,
    "reward": YELLOW,
    "infer": SKY,
    "audit": PURPLE,
    "train": ORANGE,
    "resync": GREEN,
    "wake": VERMILION,
    "checkpoint": BLACK,
}


class Panel(NamedTuple):
    """One plot over the steps: metrics with their labels, and a reference value `mark`.

    It is drawn if the run has at least one of the metrics, and the metric `needs`.
    """

    title: str
    unit: str
    lines: dict[str, str]
    mark: float | None = None
    needs: str = "time/step"

    def drawn(self, steps: Sequence[Mapping[str, Any]]) -> bool:
        return all(any(key in step for step in steps for key in keys) for keys in (self.lines, (self.needs,)))


PANELS = (
    Panel("reward", "mean of the samples", {"reward/mean": "mean"}),
    Panel("rollout speed", "response tokens a second", {"rollout/tokens_per_second": "tokens"}),
    Panel("accept length", "tokens a verify pass", {"spec/accept_length": "mean"}),
    Panel(
        "speed-up over plain decoding",
        "times",
        {"spec/achieved_speedup": "achieved", "spec/predicted_speedup": "predicted"},
        mark=1.0,
    ),
    Panel("draft steps", "mean by decode time", {"spec/steps": "mean"}, needs="spec/switches"),
)
SMOOTHED = 5  # steps in a moving mean
FEW = 40  # largest number of points that are drawn with a marker each


def figure_of(width: float, height: float) -> Figure:
    """Make an empty figure of that size in inches. It needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bare(axes: Axes) -> None:
    """Remove the top and right border, and draw faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.7)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.canvas.print_png(out)  # savefig would draw everything twice
    return out.getvalue()


def run_figure(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw metrics over the run's steps, of which there must be at least one, and the time of each phase."""
    drawn = [panel for panel in PANELS if panel.drawn(steps)]
    rows = (len(drawn) + 2) // 2
    figure = figure_of(12, 3.1 * rows)
    axes = figure.subplots(rows, 2).flatten()
    for each, panel in zip(axes, drawn, strict=False):
        _trend(each, steps, panel)
    _time_split(axes[len(drawn)], steps)
    for each in axes[: len(drawn) + 1]:
        each.set_xlabel("iteration")
        bare(each)
    for each in axes[len(drawn) + 1 :]:
        each.set_visible(False)
    return figure


def _trend(axes: Axes, steps: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    """Draw metrics by step as thin lines and, if there are enough steps, their moving means as thick lines."""
    at = np.arange(1, len(steps) + 1)
    smooth = len(steps) >= 4 * SMOOTHED
    for (key, label), color in zip(panel.lines.items(), (BLUE, VERMILION), strict=False):
        values = np.array([step.get(key, np.nan) for step in steps], dtype=float)
        dashes = "-" if color == BLUE else "--"
        thin = {"linewidth": 0.8, "alpha": 0.45} if smooth else {"linewidth": 1.5, "label": label, "linestyle": dashes}
        axes.plot(at, values, color=color, marker="o" if len(steps) <= FEW else "", markersize=2.5, **thin)
        if smooth:
            axes.plot(at, _moving_mean(values), dashes, color=color, linewidth=1.8, label=label)
    axes.set(title=panel.title, ylabel=panel.unit)
    _steps_axis(axes, len(steps))
    if panel.mark is not None:
        axes.axhline(panel.mark, color=DARK, linewidth=1, zorder=1)
    if len(panel.lines) > 1:
        axes.legend(loc="best", frameon=False)


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the SMOOTHED values around each value, of fewer at the ends; NaNs are left out."""
    ones, known = np.ones(SMOOTHED), ~np.isnan(values)
    total = np.convolve(np.where(known, values, 0.0), ones, "same")
    count = np.convolve(known.astype(float), ones, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _time_split(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    edges, base = np.arange(len(steps) + 1) + 0.5, np.zeros(len(steps))
    whole = np.array([step["time/step"] for step in steps])
    parts = {name: np.array([step.get(f"time/{name}", 0.0) for step in steps]) for name in PHASES}
    parts["other"] = np.maximum(whole - sum(parts.values()), 0.0)
    for name, seconds in parts.items():
        if seconds.sum() < 0.005 * whole.sum():
            continue  # too thin to be seen
        share = f"{name} {seconds.sum() / whole.sum():.0%}"
        axes.stairs(base + seconds, edges, baseline=base, fill=True, color=PHASES.get(name, GREY), label=share)
        base = base + seconds
    axes.set(title="time of an iteration", ylabel="seconds")
    axes.set_ylim(0, 1.45 * whole.max())  # room for the legend
    _steps_axis(axes, len(steps))
    axes.legend(loc="upper center", ncols=3, frameon=False)


def _steps_axis(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, count + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
