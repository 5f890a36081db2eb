"""The output of the converter's verify and inspect."""

from __future__ import annotations

import math

import torch
from rich.console import Group
from rich.table import Table

from respec_trainer.convert.verify import Comparison, Difference, largest_difference

SHOWN = 20  # most differences listed


def facts_table(facts: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", value)
    return table


def comparison_report(comparison: Comparison, tolerance: float) -> Group:
    """Return a summary and a table of differences: first those of names, shapes or NaN, then the largest values."""
    summary = f"{comparison.equal} of {comparison.common} tensors that both have are equal bit for bit"
    if not comparison.differences:
        return Group(summary)
    table = Table("tensor", "differs in", f"largest difference (allowed {tolerance:g})", box=None)
    for difference in sorted(comparison.differences, key=_seriousness, reverse=True)[:SHOWN]:
        largest = "" if difference.largest is None else f"{difference.largest:.3g}"
        table.add_row(difference.name, difference.what, largest)
    more = len(comparison.differences) - SHOWN
    return Group(summary, table, *([f" and {more} more"] if more > 0 else []))


def _seriousness(difference: Difference) -> float:
    incomparable = difference.largest is None or math.isnan(difference.largest)
    return math.inf if incomparable else difference.largest


def logits_line(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> tuple[str, bool]:
    """Return a line about the logits [B, S, V] of two models, and whether they agree.

    With tolerance 0, logits must be equal. Otherwise they only must be finite and the reader judges the difference,
    because how far logits may differ depends on the model.
    """
    if first.shape != second.shape:
        return f"logits of shape {list(first.shape)} and {list(second.shape)}", False
    largest = largest_difference(first.reshape(-1), second.reshape(-1))
    agree = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    text = (
        f"logits of {first.shape[0]} x {first.shape[1]} tokens: largest difference {largest:.3g} of values up to "
        f"{first.abs().max():.3g}; the likeliest token is the same at {agree:.1%}"
    )
    return text, largest == 0 if tolerance == 0 else not math.isnan(largest)
