"""RolloutFleet: all engines of the run, as one trainer rank sees them.

The ranks form spans of `rollout.engine.span`; the first rank of a span owns its engine, starts it, feeds it and ends
it. Requests are dealt to the engines group by group, and every rank gets every sample back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist

from respec_trainer.config import Config
from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending, RolloutEngine
from respec_trainer.rollout.sample import Request, Sample


class RolloutFleet:
    """Starts with the engines up. `engine` is this rank's own, None on ranks that own none."""

    def __init__(
        self,
        config: Config,
        make_engine: Callable[[int], RolloutEngine],
        control: dist.ProcessGroup,
        device: str,
    ):
        """Start this rank's engine, if it owns one.

        Args:
            make_engine: span index -> an engine, not yet started.
            control: a gloo group of all ranks, for small messages.
            device: "cuda" where engines and trainer take turns on the same GPUs' memory, "cpu" where there is none.

        Raises EngineError on every rank if any engine did not start.
        """
        span = config.rollout.engine.span or config.rollout.engine.tp
        rank, world = dist.get_rank(), dist.get_world_size()
        self.control = control
        self.sleeps = device == "cuda"  # engines give their memory back while the actor trains, and forget weights
        self.owners = list(range(0, world, span))
        self.engine = make_engine(rank // span) if rank in self.owners else None
        self.index = rank // span
        self._agree(self.engine.start if self.engine else None)

    def start(self, requests: Sequence[Request]) -> FleetPending:
        """Hand each engine its share of the requests and return at once."""
        mine = [r for i, r in enumerate(requests) if i * len(self.owners) // len(requests) == self.index]
        pending = self.engine.submit(mine) if self.engine is not None else None
        return FleetPending(self, pending)

    def sleep(self) -> None:
        """Make room for the actor, where engines and actor share a GPU."""
        if self.sleeps:
            self._agree(self.engine.sleep if self.engine else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take that room back, in two stages; the weights must be pushed between them."""
        if self.sleeps:
            self._agree((lambda: self.engine.wake(part)) if self.engine else None)

    def shutdown(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()

    def _agree(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action` on the owners; every rank gets every owner's result, or all of them the first one's error."""
        outcome: Any = None
        if action is not None:
            try:
                outcome = action()
            except EngineError as error:
                outcome = error
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self.control)
        for owner in self.owners:
            if isinstance(outcomes[owner], EngineError):
                raise EngineError(f"engine of rank {owner}: {outcomes[owner]}") from outcomes[owner]
        return [outcomes[owner] for owner in self.owners]


class FleetPending:
    """Requests the engines are working on."""

    def __init__(self, fleet: RolloutFleet, pending: Pending | None):
        self.fleet, self.pending = fleet, pending

    def collect(self) -> list[Sample]:
        """Every sample of every engine, in the order the requests were given, on every rank."""
        shares = self.fleet._agree(self.pending.collect if self.pending else None)
        return [sample for share in shares for sample in share]

    def done(self) -> int:
        """How many of this rank's own engine's requests have finished."""
        return self.pending.done() if self.pending else 0
