"""Metrics of an update. Each type of metric defines how it is combined over micro-batches, minibatches and ranks.

    Tokens(mask).mean(values)     the mean over the tokens where mask is True
    Tokens(mask).largest(values)  the largest of them; `smallest` likewise
    PerUpdate.of(value)           added up over micro-batches and ranks, then the mean over updates

An objective's loss returns `Metrics` of its micro-batch. The actor combines them with `merge`, over data-parallel ranks
with `pack` and `unpack`, and copies all of them from the device once a step, with `finish`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

Scalar = torch.Tensor | float  # a float64 tensor without dimensions; a float once it is copied from the device


class Metric(ABC):
    """One number of an update, in parts that can be combined. Subclasses are frozen dataclasses of Scalars."""

    added: ClassVar[tuple[str, ...]] = ()  # fields that add up
    compared: ClassVar[tuple[str, ...]] = ()  # fields of which the maximum is kept

    @abstractmethod
    def finish(self, updates: int) -> float | None:
        """Return the number to report, from fields that are floats merged over `updates` updates; None: report none."""


Metrics = Mapping[str, Metric]


@dataclass(frozen=True)
class Mean(Metric):
    """The mean, total / count; `empty` if count is 0."""

    total: Scalar
    count: Scalar
    empty: float | None = 0.0
    added = ("total", "count")

    def finish(self, updates: int) -> float | None:
        return self.total / self.count if self.count else self.empty


@dataclass(frozen=True)
class PerUpdate(Metric):
    """The mean over updates of a number that each update has, such as the loss."""

    total: Scalar
    added = ("total",)

    @classmethod
    def of(cls, value: torch.Tensor) -> PerUpdate:
        """Make the metric of a tensor of one element, without its gradient."""
        return cls(value.detach().double())

    def finish(self, updates: int) -> float:
        return self.total / updates


@dataclass(frozen=True)
class Extreme(Metric):
    """The largest of all values (sign 1), or the smallest (sign -1); not reported where count is 0."""

    signed: Scalar  # sign times the extreme, so that a maximum combines both kinds
    count: Scalar
    sign: float
    added = ("count",)
    compared = ("signed",)

    def finish(self, updates: int) -> float | None:
        return self.sign * self.signed if self.count else None


class Tokens:
    """The tokens where mask [B, S] is True; makes metrics over them from values [B, S].

    `empty` is the value of a mean if a whole step has no such token: 0, or None to leave it out.
    """

    def __init__(self, mask: torch.Tensor, empty: float | None = 0.0):
        self.mask, self.count, self.empty = mask, mask.sum().double(), empty

    def mean(self, values: torch.Tensor) -> Mean:
        """The mean of numbers, or for booleans the share that is True."""
        inside = torch.where(self.mask, values.detach(), values.new_zeros(()))
        return Mean(inside.sum().double(), self.count, self.empty)

    def largest(self, values: torch.Tensor) -> Extreme:
        return Extreme(torch.where(self.mask, values.detach(), -torch.inf).max().double(), self.count, 1.0)

    def smallest(self, values: torch.Tensor) -> Extreme:
        return Extreme(-torch.where(self.mask, values.detach(), torch.inf).min().double(), self.count, -1.0)


def merge(parts: Sequence[Metrics]) -> Metrics:
    """Combine the metrics of several micro-batches or minibatches. Raises ValueError if their names differ."""
    for part in parts:
        if part.keys() != parts[0].keys():
            names = ", ".join(sorted(part.keys() ^ parts[0].keys()))
            raise ValueError(
                f"a loss gave {names} for some micro-batches only: it must give the same metrics for every one; where "
                "a metric may have no tokens, use Tokens(mask, empty=None)"
            )
    return {name: _merged([part[name] for part in parts]) for name in parts[0]}


def pack(metrics: Metrics) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the fields to add over ranks in one tensor [N], and those to take the maximum of in another [M].

    Each tensor needs one reduction; `unpack` is the inverse. Every rank's metrics must have the same names, in the same
    order.
    """
    added = [getattr(metric, field) for metric in metrics.values() for field in metric.added]
    compared = [getattr(metric, field) for metric in metrics.values() for field in metric.compared]
    values = torch.stack([*added, *compared])
    return values[: len(added)], values[len(added) :]


def unpack(metrics: Metrics, added: Iterable[Scalar], compared: Iterable[Scalar]) -> Metrics:
    """Return the same metrics with other values, given in the order of `pack`."""
    added, compared = iter(added), iter(compared)
    return {
        name: replace(
            metric,
            **{field: next(added) for field in metric.added},
            **{field: next(compared) for field in metric.compared},
        )
        for name, metric in metrics.items()
    }


def finish(metrics: Metrics, updates: int = 1) -> dict[str, float]:
    """Return the numbers to report of metrics merged over `updates` updates, with one copy from the device."""
    added, compared = pack(metrics)
    values = torch.cat([added, compared]).tolist()
    copied = unpack(metrics, values[: len(added)], values[len(added) :])
    numbers = {name: metric.finish(updates) for name, metric in copied.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _merged(metrics: Sequence[Metric]) -> Metric:
    first = metrics[0]
    together = {
        field: torch.stack([getattr(metric, field) for metric in metrics]) for field in first.added + first.compared
    }
    return replace(
        first,
        **{field: together[field].sum() for field in first.added},
        **{field: together[field].max() for field in first.compared},
    )
