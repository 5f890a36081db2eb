"""SpeedupTable: the speed-up of every shape at every batch size, and the policy that follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from respec_trainer.config import PositiveFloat, PositiveInt, Section
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.shape import OFF, Shape


class SpeedupTable(Section):
    """Speed-ups over plain decoding, one row per batch size. Plain decoding has no column; its speed-up is 1."""

    source: str
    batches: Annotated[list[PositiveInt], Field(min_length=1)]
    shapes: Annotated[list[Shape], Field(min_length=1)]
    speedups: list[list[PositiveFloat]]  # [batches][shapes]

    @model_validator(mode="after")
    def _is_a_table(self) -> SpeedupTable:
        if sorted(set(self.batches)) != self.batches:
            raise ValueError(f"batches: {self.batches} must rise")
        faults = [fault for shape in self.shapes if (fault := shape.fault())]
        if faults or OFF in self.shapes or len(set(self.shapes)) < len(self.shapes):
            raise ValueError(f"shapes: {'; '.join(faults) or 'each once, and no plain decoding'}")
        if len(self.speedups) != len(self.batches):
            raise ValueError(f"speedups: {len(self.speedups)} rows for {len(self.batches)} batches")
        for index, row in enumerate(self.speedups):
            if len(row) != len(self.shapes):
                raise ValueError(f"speedups.{index}: {len(row)} numbers for {len(self.shapes)} shapes")
        return self

    def best(self, row: int) -> tuple[Shape, float]:
        """Return the best shape in a row, plain decoding included, and its speed-up."""
        speedup, column = max((speedup, -column) for column, speedup in enumerate(self.speedups[row]))
        return (self.shapes[-column], speedup) if speedup > 1 else (OFF, 1.0)

    def policy(self) -> dict[int, Shape]:
        """Return the best shape for each batch size."""
        return {batch: self.best(row)[0] for row, batch in enumerate(self.batches)}

    def gain(self) -> float:
        """Return the geometric mean over rows of the best speed-up in each."""
        return _geometric_mean([self.best(row)[1] for row in range(len(self.batches))])

    def static(self, switched: bool = False) -> tuple[Shape, float]:
        """Return the best single shape and its geometric mean: always on, or with `switched` only where it pays."""
        floor = 1.0 if switched else 0.0
        columns = zip(*self.speedups, strict=True)
        means = [_geometric_mean([max(speedup, floor) for speedup in column]) for column in columns]
        column = max(range(len(means)), key=means.__getitem__)
        return self.shapes[column], means[column]


def steps_by_batch(policy: Mapping[int, Shape]) -> dict[int, int]:
    """Return the draft steps from each batch size on at which they change. Raises ConfigError for a tree."""
    steps: dict[int, int] = {}
    for batch in sorted(policy):
        shape = policy[batch]
        if not shape.is_chain:
            raise ConfigError(
                f"batch {batch}: the engine switches chains only, (s, 1, s + 1), but the best shape is ({shape}); "
                "choose among chains, or start the engine with this one shape"
            )
        if not steps or steps[max(steps)] != shape.steps:
            steps[batch] = shape.steps
    return steps


def write_engine_table(policy: Mapping[int, Shape], path: str | Path) -> None:
    """Write the policy as SGLang's own `speculative_adaptive_config`: fixed draft steps from each batch size on."""
    slots = {str(batch): {"candidate_steps": [steps]} for batch, steps in steps_by_batch(policy).items()}
    Path(path).write_text(json.dumps(slots, indent=1))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
