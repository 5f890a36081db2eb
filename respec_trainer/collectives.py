"""Collectives: what ranks tell each other in small messages. Every rank of a group calls a function, in one order.

`group` is a gloo group for objects; None stands for the default group. In a process that belongs to no group, and in a
group of one rank, nothing is sent and every function returns what this rank has.
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
    """As much of an engine as `agree` needs. `failure` says why it is dead; None while it lives."""

    failure: Exception | None

    def shutdown(self) -> None: ...


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's `value`, in the order of the ranks, on every rank."""
    if _alone(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Value, source: int = 0, group: dist.ProcessGroup | None = None) -> Value:
    """The `value` of rank `source` of the default group, on every rank; what the others pass is not looked at."""
    if _alone(group):
        return value
    message = [value]
    dist.broadcast_object_list(message, src=source, group=group)
    return message[0]


def from_first(action: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """What `action` returns on the group's first rank, on every rank. The other ranks do not run it.

    Raises its RespecError on every rank.
    """
    outcome: tuple[Any, RespecError | None] = None, None
    if _alone(group) or dist.get_rank(group) == 0:
        try:
            outcome = action(), None
        except RespecError as error:
            outcome = None, error
    # Not broadcast: the first rank must not go on, and end on its error, before the others have come to hear it.
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
    """Run `action` on every rank; every rank gets what each rank's returned, or all of them raise.

    Args:
        action: None on ranks that have nothing to do; their result is None.
        engine: this rank's own. If it is found dead its processes are ended at once: that frees its memory, and
            whoever waits for it in a collective.
        fatal: errors after which no engine can be trusted to be whole: all are ended, as if they had died.

    Raises EngineLostError on every rank if an engine died, else the first rank's EngineError or ResyncError.
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
    told = gather((outcome, error, dead), group)
    errors = {rank: error for rank, (_, error, _) in enumerate(told) if error is not None}
    lost = {rank: error for rank, error in errors.items() if told[rank][2] or isinstance(error, fatal)}
    if lost and fatal and engine is not None:
        engine.shutdown()
    if lost:
        raise EngineLostError("; ".join(f"engine of rank {rank}: {error}" for rank, error in lost.items()))
    for rank, error in errors.items():
        raise type(error)(f"rank {rank}: {error}") from error
    return [outcome for outcome, _, _ in told]


def reduce(
    values: Sequence[float], operation: Operation = "sum", group: dist.ProcessGroup | None = None
) -> list[float]:
    """Each of `values` over all ranks, in float64 and on the CPU."""
    here = torch.tensor(values, dtype=torch.float64)
    if not _alone(group):
        dist.all_reduce(here, OPERATIONS[operation], group=group)
    return here.tolist()


def sum_over(
    tensors: Sequence[torch.Tensor], device: torch.device | str, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Each of `tensors` summed over all ranks, in float64: of the same shapes, on the CPU.

    One message carries them all. `device` is where the group's backend wants it.
    """
    flat = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors]).to(device)
    if not _alone(group):
        dist.all_reduce(flat, group=group)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _alone(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1
