"""Collectives: small messages between ranks. Every rank of a group calls the same functions in the same order.

`group` is a gloo group for objects; None stands for the default group. In a process that belongs to no group, and in a
group of one rank, nothing is sent and every function returns the value of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from respec_trainer.errors import EngineError, EngineLostError, RespecError, ResyncError

Value = TypeVar("Value")
Operation = Literal["sum", "max", "min"]
OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Endable(Protocol):
    """The part of an engine that `agree` needs. `failure` is the error that ended it; None while it works."""

    failure: Exception | None

    def shutdown(self) -> None: ...


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return the `value` of every rank, in rank order, on every rank."""
    if _alone(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Value, source: int = 0, group: dist.ProcessGroup | None = None) -> Value:
    """Return the `value` of rank `source` of the default group on every rank; the other ranks' values are ignored."""
    if _alone(group):
        return value
    message = [value]
    dist.broadcast_object_list(message, src=source, group=group)
    return message[0]


def from_first(action: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """Run `action` on the group's first rank only, and return its result on every rank.

    If `action` raises a RespecError, every rank raises it.
    """
    outcome: tuple[Any, RespecError | None] = None, None
    if _alone(group) or dist.get_rank(group) == 0:
        try:
            outcome = action(), None
        except RespecError as error:
            outcome = None, error
    # Gathered, not broadcast: the first rank must not continue, and end with its error, before the others received it.
    value, error = gather(outcome, group)[0]
    if error is not None:
        raise error
    return value


def agree(
    action: Callable[[], Any] | None,
    engine: Endable | None,
    group: dist.ProcessGroup | None,
    fatal: type[Exception] | tuple = (),
) -> list[Any]:
    """Run `action` on every rank. Every rank gets the results of all ranks, or all ranks raise.

    Args:
        action: None on ranks that have nothing to do; their result is None.
        engine: this rank's engine. If it is dead, its processes are ended at once: this frees its memory, and releases
            processes that wait for it in a collective.
        fatal: errors after which the state of every engine is unknown: all engines are ended, as if they had died.

    Raises EngineLostError on every rank if an engine died; otherwise the EngineError or ResyncError of the lowest rank
    that has one.
    """
    outcome: Any = None
    error: Exception | None = None
    try:
        outcome = action() if action else None
    except (EngineError, ResyncError) as raised:
        error = raised
    dead = error is not None and engine is not None and engine.failure is not None
    if dead:
        engine.shutdown()
    gathered = gather((outcome, error, dead), group)
    errors = {rank: error for rank, (_, error, _) in enumerate(gathered) if error is not None}
    lost = {rank: error for rank, error in errors.items() if gathered[rank][2] or isinstance(error, fatal)}
    if lost and fatal and engine is not None:
        engine.shutdown()
    if lost:
        raise EngineLostError("; ".join(f"engine of rank {rank}: {error}" for rank, error in lost.items()))
    for rank, error in errors.items():
        raise type(error)(f"rank {rank}: {error}") from error
    return [outcome for outcome, _, _ in gathered]


def reduce(
    values: Sequence[float], operation: Operation = "sum", group: dist.ProcessGroup | None = None
) -> list[float]:
    """Reduce each of `values` over all ranks, in float64 and on the CPU."""
    local = torch.tensor(values, dtype=torch.float64)
    if not _alone(group):
        dist.all_reduce(local, OPERATIONS[operation], group=group)
    return local.tolist()


def sum_over(
    tensors: Sequence[torch.Tensor], device: torch.device | str, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Sum each of `tensors` over all ranks, in float64. The sums have the same shapes and are on the CPU.

    All tensors are sent in one message. `device` is the device that the group's backend needs.
    """
    flat = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors]).to(device)
    if not _alone(group):
        dist.all_reduce(flat, group=group)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _alone(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1
