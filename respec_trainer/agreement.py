"""agree: what one rank's engine did becomes known to all ranks, so that they go on, or stop, together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from respec_trainer.errors import EngineError, EngineLostError, ResyncError

if TYPE_CHECKING:
    from respec_trainer.rollout.engine import RolloutEngine


def agree(
    action: Callable[[], Any] | None,
    engine: RolloutEngine | None,
    control: dist.ProcessGroup | None,
    fatal: type[Exception] | tuple = (),
) -> list[Any]:
    """Run `action` on every rank; every rank gets what each rank's returned, or all of them raise.

    Args:
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
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (outcome, error, dead), group=control)
    errors = {rank: error for rank, (_, error, _) in enumerate(told) if error is not None}
    lost = {rank: error for rank, error in errors.items() if told[rank][2] or isinstance(error, fatal)}
    if lost and fatal and engine is not None:
        engine.shutdown()
    if lost:
        raise EngineLostError("; ".join(f"engine of rank {rank}: {error}" for rank, error in lost.items()))
    for rank, error in errors.items():
        raise type(error)(f"rank {rank}: {error}") from error
    return [outcome for outcome, _, _ in told]
