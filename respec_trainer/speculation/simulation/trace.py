"""Length traces: the lengths and acceptance of a rollout's responses, to replay it. One JSON object a line:

    {"prompt_tokens": 61, "response_tokens": 840, "group": 3, "acceptance": [0.81, 0.74, 0.7]}
    {"prompt_tokens": 61, "response_tokens": 102, "group": 3, "accept_histogram": [30, 12, 9, 11]}

The responses of a group share their prompt. `accept_histogram[k]` counts the verify passes that kept k drafts, all with
the same number of draft steps. If the draft steps changed, give `acceptance` instead: by depth, given that all drafts
before that depth were kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError, model_validator

from respec_trainer.config import Fraction, NonNegativeInt, PositiveInt, Section
from respec_trainer.errors import DataError
from respec_trainer.speculation.acceptance import depth_acceptance
from respec_trainer.speculation.profiling.profile import explain


class TraceRow(Section):
    """One response."""

    prompt_tokens: PositiveInt
    response_tokens: PositiveInt
    group: NonNegativeInt
    acceptance: Annotated[list[Fraction], Field(min_length=1)] | None = None
    accept_histogram: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_acceptance(self) -> TraceRow:
        if self.acceptance is not None and self.accept_histogram is not None:
            raise ValueError("acceptance: give it or accept_histogram, not both")
        return self


@dataclass(frozen=True)
class Trace:
    """The R responses of a rollout, in the order of their requests."""

    prompt: np.ndarray  # [R] tokens
    length: np.ndarray  # [R] tokens
    group: np.ndarray  # [R]
    acceptance: np.ndarray  # [R, D] by depth, given that all drafts before it were kept

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def mean_acceptance(self) -> list[float]:
        """Return the acceptance by depth over all responses, each weighted by its tokens."""
        return conditional(self.acceptance, self.length)


def load_trace(path: str | Path, acceptance: Sequence[float] | None = None) -> Trace:
    """Read a trace; `acceptance` is the default for rows without acceptance of their own.

    A depth that a row's histogram never reached gets the acceptance of all histograms together. Raises DataError if the
    file is missing, empty or malformed, naming the line and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no length trace at {path}")
    rows = [_parse(path, number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} has no rows")
    return make_trace([row for _, row in rows], acceptance, [f"{path} line {number}" for number, _ in rows])


def _parse(path: Path, number: int, line: str) -> tuple[int, TraceRow]:
    try:
        return number, TraceRow.model_validate_json(line)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise DataError(f"{path} line {number}: not valid JSON") from error
        raise DataError("\n".join([f"{path} line {number}:", *explain(error)])) from error


def make_trace(
    rows: Sequence[TraceRow], acceptance: Sequence[float] | None = None, names: Sequence[str] | None = None
) -> Trace:
    """Make a trace of rows, with the defaults of `load_trace`; `names` are the rows' names in errors."""
    histograms = [row.accept_histogram for row in rows if row.accept_histogram]
    pooled = depth_acceptance([sum(counts) for counts in zip_longest(*histograms, fillvalue=0)])
    own = []
    for index, row in enumerate(rows):
        found = row.acceptance
        if row.accept_histogram:
            seen = depth_acceptance(row.accept_histogram)
            found = seen + pooled[len(seen) :]
        found = found or acceptance
        if not found:
            name = names[index] if names else f"row {index}"
            raise DataError(f"{name}: acceptance: no drafts in it or in accept_histogram; give a default")
        own.append(list(found))
    depth = max(map(len, own))
    return Trace(
        np.array([row.prompt_tokens for row in rows]),
        np.array([row.response_tokens for row in rows]),
        np.array([row.group for row in rows]),
        np.array([values + values[-1:] * (depth - len(values)) for values in own], dtype=float),
    )


def save_trace(rows: Sequence[TraceRow], path: str | Path) -> None:
    """Write rows as `load_trace` reads them."""
    lines = [json.dumps(row.model_dump(exclude_none=True)) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n")


def conditional(acceptance: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
    """Return a batch's acceptance by depth: the share of the survivors so far that is kept. [R, D], [R] -> D."""
    survivors = np.average(acceptance.cumprod(1), axis=0, weights=weights)
    before = np.concatenate([[1.0], survivors[:-1]])
    return np.divide(survivors, before, out=np.zeros_like(survivors), where=before > 0).tolist()
