"""Solver: finds the fastest shape, or none, for a batch size, a context length and an acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.acceptance import Acceptance, tokens_per_cycle
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.profiling.fit import fit_costs
from respec_trainer.speculation.profiling.profile import Profile
from respec_trainer.speculation.profiling.table import SpeedupTable
from respec_trainer.speculation.shape import OFF, Shape


@dataclass(frozen=True)
class Solver:
    """Predicts speed from costs. The choices are `shapes` and plain decoding."""

    costs: CostModel
    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, profile: Profile) -> Solver:
        """Fit the profile. Raises ConfigError if it has too few cells."""
        return cls(fit_costs(profile), tuple(profile.shapes()))

    def tokens_per_second(self, shape: Shape, batch: float, context: float, acceptance: Acceptance) -> float:
        """Return the tokens a second of all `batch` sequences together, with `context` tokens each."""
        return batch * tokens_per_cycle(shape, acceptance) / self.costs.cycle_seconds(shape, batch, context)

    def speedup(self, shape: Shape, batch: float, context: float, acceptance: Acceptance) -> float:
        """Return the speed relative to plain decoding."""
        tokens = tokens_per_cycle(shape, acceptance)
        return tokens * self.costs.step_seconds(batch, context) / self.costs.cycle_seconds(shape, batch, context)

    def best(self, batch: float, context: float, acceptance: Acceptance) -> Shape:
        """Return the fastest shape; OFF unless one is faster than plain decoding."""
        return max((OFF, *self.shapes), key=lambda shape: self.speedup(shape, batch, context, acceptance))

    def table(self, batches: Sequence[int], context: int, acceptance: Acceptance) -> SpeedupTable:
        """Return a table of predicted speed-ups; its policy is `best` at each batch size."""
        rows = [[self.speedup(shape, batch, context, acceptance) for shape in self.shapes] for batch in batches]
        return SpeedupTable(
            source=f"predicted, context {context}", batches=list(batches), shapes=list(self.shapes), speedups=rows
        )


def measured_table(profile: Profile, context: int, acceptance: Acceptance) -> SpeedupTable:
    """Return the speed-ups by measured times at one context length, for the batch sizes measured with every shape.

    Raises ConfigError if no batch size has every shape at this context length.
    """
    shapes = profile.shapes()
    at = {(cell.batch, cell.shape): cell.seconds for cell in profile.cells if cell.decodes and cell.context == context}
    batches = sorted(batch for batch, shape in at if shape == OFF and all((batch, other) in at for other in shapes))
    if not batches or not shapes:
        held = sorted({cell.context for cell in profile.cells})
        raise ConfigError(f"no batch size of the profile has every shape at context={context}; it has contexts {held}")
    rows = [
        [tokens_per_cycle(shape, acceptance) * at[batch, OFF] / at[batch, shape] for shape in shapes]
        for batch in batches
    ]
    return SpeedupTable(source=f"measured, context {context}", batches=batches, shapes=shapes, speedups=rows)
