"""report.html: a run's metrics and figures in one file, written from the run's folder alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from respec_trainer.errors import DataError
from respec_trainer.telemetry.recorder import read_metrics, timeline_files
from respec_trainer.telemetry.summary import END_STEPS
from respec_trainer.telemetry.timeline import load_timelines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows of the table: metric, label, format.
ROWS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/solve_rate", "solve rate", "{:.0%}"),
    ("rollout/tokens_per_second", "tokens / s", "{:,.0f}"),
    ("rollout/response_length", "response length, tokens", "{:.1f}"),
    ("spec/accept_length", "accept length", "{:.2f}"),
    ("spec/steps", "draft steps", "{:.2f}"),
    ("spec/off_fraction", "without speculation", "{:.0%}"),
    ("spec/achieved_speedup", "speed-up over plain decoding", "{:.2f}"),
    ("spec/predicted_speedup", "speed-up predicted", "{:.2f}"),
    ("spec/switches", "changes of the draft steps", "{:.0f}"),
    ("spec/chooser_failures", "failures of the depth chooser", "{:.0f}"),
    ("mismatch/kl", "mismatch KL", "{:.2g}"),
    ("time/step", "seconds an iteration", "{:.1f}"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
img { max-width: 100%; }
table { border-collapse: collapse; }
td, th { padding: .15em 1.2em .15em 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid #999; }
p.note { color: #555; max-width: 60em; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }
"""
INSIDE = (
    "Over the time of the rollout: the sequences that decode together, the draft steps chosen for them, tokens a "
    "verify pass and sequence, and the speed-up over plain decoding: as predicted when the steps were chosen, and as "
    "achieved, compared with the profile's seconds of plain decoding. Grey: without speculation."
)


def write_page(run: Path, out: Path | None = None) -> Path:
    """Write `out`, by default report.html in the run's folder, and return its path.

    Raises DataError if the folder holds no finished step, or a file that no run wrote.
    """
    from respec_trainer.telemetry.figures import run_figure
    from respec_trainer.telemetry.phase_figure import phase_figure

    if not (run / "metrics.jsonl").is_file():
        raise DataError(f"no metrics.jsonl in {run}: give the folder of a run, such as runs/NAME")
    steps = read_metrics(run)
    if not steps:
        raise DataError(f"{run} has no finished step yet: there is nothing to draw")
    body = [_head(run, steps), _table(steps), _section("Over the run", run_figure(steps), "metrics by iteration")]
    files = timeline_files(run)
    phases = {step: load_timelines(files[step]) for step in _ends_and_middle(list(files))}
    phases = {step: lines for step, lines in phases.items() if any(line.decodes.any() for line in lines)}
    if phases:
        body.append(_section("Inside a rollout", phase_figure(phases), "rollouts by time", INSIDE))
    config = (run / "config.yaml").read_text() if (run / "config.yaml").is_file() else "not recorded"
    body.append(f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>")
    out = out or run / "report.html"
    name = escape(run.resolve().name)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    out.write_text("\n".join([head, *body, "</html>\n"]))
    return out


def _ends_and_middle(steps: Sequence[int]) -> list[int]:
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def _head(run: Path, steps: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(step["time/step"] for step in steps)
    tokens = sum(step["rollout/tokens"] for step in steps)
    facts = [f"{len(steps)} iterations", f"{seconds:,.0f} s", f"{tokens:,} response tokens"]
    failed = [index for index, step in enumerate(steps, 1) if step.get("spec/chooser_failures")]
    if failed:
        facts.append(f"<strong>speculation was turned off: the depth chooser failed in iteration {failed[0]}</strong>")
    return f"<h1>{escape(run.resolve().name)}</h1><p>{' · '.join(facts)}</p>"


def _table(steps: Sequence[Mapping[str, Any]]) -> str:
    """Make the table of means over the first and the last few steps, and over all steps."""
    ends = max(1, min(END_STEPS, len(steps) // 2))
    parts = {f"first {ends}": steps[:ends], f"last {ends}": steps[-ends:], "all": steps}
    rows = ["<tr><th>mean over iterations</th>" + "".join(f"<th>{name}</th>" for name in parts) + "</tr>"]
    for key, name, form in ROWS:
        if any(key in step for step in steps):
            cells = [_cell([step[key] for step in part if key in step], form) for part in parts.values()]
            rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _cell(values: Sequence[float], form: str) -> str:
    return f"<td>{form.format(fmean(values)) if values else '-'}</td>"


def _section(title: str, figure: Figure, alt: str, note: str = "") -> str:
    from respec_trainer.telemetry.figures import png

    data = base64.b64encode(png(figure)).decode()
    words = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>{title}</h2>{words}<img alt="{alt}" src="data:image/png;base64,{data}">'
