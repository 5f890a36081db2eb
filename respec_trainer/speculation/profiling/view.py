"""Show a table of speed-ups: on the terminal, and as a heat map."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from respec_trainer.speculation.profiling.table import SpeedupTable
from respec_trainer.speculation.shape import OFF


def render(table: SpeedupTable) -> Table:
    """Render a row for each batch size with its best shape marked, and the geometric means of three policies below."""
    shape, static = table.static()
    switched_shape, switched = table.static(switched=True)
    view = Table(
        title=f"speed-up over plain decoding by (s,t,n): {table.source}",
        caption=f"geometric mean: best in each row {table.gain():.3f}; always {shape} {static:.3f}; "
        f"{switched_shape} where it pays {switched:.3f}",
    )
    for name in ("batch", *map(str, table.shapes), "best"):
        view.add_column(name, justify="right")
    for row, batch in enumerate(table.batches):
        best, _ = table.best(row)
        cells = zip(table.shapes, table.speedups[row], strict=True)
        view.add_row(str(batch), *(_cell(speedup, other == best) for other, speedup in cells), str(best))
    return view


def _cell(speedup: float, best: bool) -> str:
    text = f"{speedup:.3f}"
    return f"[bold green]{text}[/]" if best else f"[dim]{text}[/]" if speedup < 1 else text


def heat_map(table: SpeedupTable, path: str | Path) -> None:
    """Write a PNG: blue above a speed-up of 1, red below, white at 1, with a frame around the best of each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    far = max(1.05, *(max(value, 1 / value) for row in table.speedups for value in row))
    figure = Figure(figsize=(2 + 0.8 * len(table.shapes), 1.5 + 0.45 * len(table.batches)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table.speedups, cmap="RdBu", norm=LogNorm(1 / far, far), aspect="auto")
    for row, speedups in enumerate(table.speedups):
        best, _ = table.best(row)
        for column, value in enumerate(speedups):
            dark = abs(math.log(value)) > 0.6 * math.log(far)
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        if best != OFF:
            corner = (table.shapes.index(best) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=2, edgecolor="black"))
    axes.set_xticks(range(len(table.shapes)), [str(shape) for shape in table.shapes])
    axes.set_yticks(range(len(table.batches)), [str(batch) for batch in table.batches])
    axes.set(xlabel="s,t,n", ylabel="active batch", title=f"speed-up over plain decoding\n{table.source}")
    ticks = [far**power for power in (-1, -0.5, 0, 0.5, 1)]
    figure.colorbar(image, ax=axes, ticks=ticks, format="%.2f").minorticks_off()
    figure.savefig(path, dpi=120, format="png")
