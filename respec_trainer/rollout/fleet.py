"""RolloutFleet: all engines of the run, as one trainer rank sees them.

The ranks form spans of `rollout.engine.span`; the first rank of a span owns its engine, starts it, feeds it and ends
it. Requests are dealt to the engines group by group, and every rank gets every sample back.

An engine that dies is ended, and every rank hears of it by an EngineLostError; `restart` brings it back, with the
weights of its folders. `rollouts.py` does that, and pushes the current ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist

from respec_trainer.agreement import agree
from respec_trainer.config import Config
from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending, RolloutEngine
from respec_trainer.rollout.ledger import Ledger
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.rollout.steps import StepLog


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
        self.resume = config.rollout.engine.resume == "tokens"
        self.owners = list(range(0, world, span))
        self.engine = make_engine(rank // span) if rank in self.owners else None
        self.index = rank // span
        self.counts: Counter[str] = Counter()  # of this rank's engine, since they were last taken
        self.logs: list[StepLog] = []  # of this rank's engine, from before it was last asked aside
        self._agree(self.engine.start if self.engine else None)

    def start(self, requests: Sequence[Request]) -> FleetPending:
        """Hand each engine its share of the requests and return at once."""
        mine = [r for i, r in enumerate(requests) if i * len(self.owners) // len(requests) == self.index]
        return FleetPending(self, mine)

    def ask_each(self, request: Request) -> list[Sample]:
        """Every engine's answer to the same request, on every rank. Rollouts' step logs do not hold it."""
        return self._agree((lambda: self._ask(request)) if self.engine else None)

    def check(self) -> None:
        """Raise EngineLostError on every rank if an engine died since it was last heard of."""
        self._agree(self._check if self.engine else None)

    def restart(self) -> None:
        """Start every dead engine anew. Raises EngineLostError on every rank if one does not start."""
        self._agree(self._restart if self.engine else None)

    def sleep(self) -> None:
        """Make room for the actor, where engines and actor share a GPU."""
        if self.sleeps:
            self._agree(self.engine.sleep if self.engine else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take that room back, in two stages; the weights must be pushed between them."""
        if self.sleeps:
            self._agree((lambda: self.engine.wake(part)) if self.engine else None)

    def take_counts(self) -> Counter[str]:
        """Sums over all engines since the last call: restarts, lost_tokens, resumed_tokens."""
        counts, self.counts = self.counts, Counter()
        return sum(self._agree(lambda: counts), Counter())

    def take_steps(self) -> list[StepLog]:
        """What the engines' batches did since the last call, on every rank; engines that log none add nothing.

        One log an engine, and one more for each time that a rollout of its was interrupted.
        """
        return [log for logs in self._agree(self._take_steps if self.engine else None) for log in logs]

    def shutdown(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()

    def _ask(self, request: Request) -> Sample:
        self.logs = self._take_steps()
        answer = self.engine.submit([request]).collect()[0]
        self.logs += [StepLog(failures=log.failures) for log in (self.engine.take_steps(),) if log.failures]
        return answer

    def _take_steps(self) -> list[StepLog]:
        logs, self.logs = self.logs, []
        return [log for log in (*logs, self.engine.take_steps()) if len(log) or log.failures]

    def _check(self) -> None:
        if self.engine.failure is not None:
            raise self.engine.failure

    def _restart(self) -> None:
        if self.engine.failure is not None:
            self.counts["restarts"] += 1
            self.engine.shutdown()
            self.engine.start()

    def _agree(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action`, None on ranks that own no engine; every rank gets every owner's result, or all raise."""
        results = agree(action, self.engine, self.control)
        return [results[owner] for owner in self.owners]


class FleetPending:
    """Requests the engines are working on. They run from the moment this is made."""

    def __init__(self, fleet: RolloutFleet, mine: Sequence[Request]):
        self.fleet = fleet
        self.ledger = Ledger(mine, fleet.resume)
        self.pending: Pending | None = None
        self.asked = 0  # requests of it
        with contextlib.suppress(EngineError):  # only this rank knows of it: `collect` tries again, and all hear of it
            self._submit()

    def collect(self) -> list[Sample]:
        """Every sample of every engine, in the order the requests were given, on every rank.

        Raises EngineLostError on every rank if an engine died, once the others have finished. What they drew is kept:
        after `RolloutFleet.restart` and a push of the same weights, collect again.
        """
        shares = self.fleet._agree(self._collect if self.fleet.engine else None)
        return [sample for share in shares for sample in share]

    def done(self) -> int:
        """How many of this rank's own engine's requests have finished."""
        return self.pending.done() if self.pending else 0

    def generating(self) -> bool:
        """Whether this rank's own engine has requests that have not finished."""
        return self.pending is not None and self.done() < self.asked

    def _submit(self) -> None:
        if self.fleet.engine is not None and self.pending is None and self.ledger.open():
            requests = self.ledger.remaining()
            self.pending, self.asked = self.fleet.engine.submit(requests), len(requests)

    def _collect(self) -> list[Sample]:
        self._submit()
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                self.ledger.add(pending.collect())
            except EngineError:
                if self.fleet.engine.failure is not None:
                    self._salvage(pending)
                raise
        return self.ledger.samples()

    def _salvage(self, pending: Pending) -> None:
        before = self.ledger.lost_tokens, self.ledger.resumed_tokens
        self.ledger.add(pending.delivered())
        self.fleet.counts["lost_tokens"] += self.ledger.lost_tokens - before[0]
        self.fleet.counts["resumed_tokens"] += self.ledger.resumed_tokens - before[1]
