"""Progress of a run: on a terminal a panel with the current phase and the last steps, elsewhere a line a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

COLUMNS = (
    ("step", "step", "{:d}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("accept len", "spec/accept_length", "{:.2f}"),
    ("tokens/s", "rollout/tokens_per_second", "{:.0f}"),
    ("length", "rollout/response_length", "{:.1f}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("grad norm", "policy/grad_norm", "{:.3f}"),
    ("generate", "time/generate", "{:.1f}s"),
    ("train", "time/train", "{:.1f}s"),
    ("resync", "time/resync", "{:.2f}s"),
    ("total", "time/step", "{:.1f}s"),
)
ROWS_SHOWN = 12


class Progress:
    """Shows the progress of a run. Use as a context manager; with mode "off" it prints nothing."""

    def __init__(self, steps: int, mode: Literal["auto", "panel", "lines", "off"], console: Console | None = None):
        self.steps, self.console = steps, console or Console(width=None)
        self.mode = mode if mode != "auto" else ("panel" if self.console.is_terminal else "lines")
        self.rows: list[Mapping[str, Any]] = []
        self.phase_name, self.note = "starting", ""
        self._live = Live(console=self.console, refresh_per_second=4) if self.mode == "panel" else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Show that a phase of the loop, or of the start, begins."""
        self.phase_name = name
        if self._live:
            self._live.update(self._panel())
        elif self.mode == "lines" and not self.rows and name not in PHASES_OF_A_STEP:
            self.console.print(name)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a completed step."""
        self.rows.append({"step": step + 1, **metrics})
        if self._live:
            self._live.update(self._panel())
        elif self.mode == "lines":
            line = f"[{step + 1}/{self.steps}] {self._line(self.rows[-1])}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def notify(self, text: str) -> None:
        if self.mode != "off":
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, row: Mapping[str, Any]) -> str:
        return "  ".join(f"{title} {_cell(row, key, form)}" for title, key, form in COLUMNS[1:])

    def _panel(self) -> Panel:
        table = Table(box=None, pad_edge=False)
        for title, _, _ in COLUMNS:
            table.add_column(title, justify="right")
        for row in self.rows[-ROWS_SHOWN:]:
            table.add_row(*(_cell(row, key, form) for _, key, form in COLUMNS))
        return Panel(table, title=f"step {len(self.rows) + 1} of {self.steps}: {self.phase_name}", title_align="left")


PHASES_OF_A_STEP = {"generate", "learn", "reward", "infer", "audit", "train", "resync", "wake", "checkpoint"}


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"
