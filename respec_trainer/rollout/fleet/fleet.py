"""RolloutFleet: all engines of the run, as one trainer rank sees them.

Some ranks own an engine (`placement.py` says which): they start it, feed it and end it, whether it is their child or
lives on a rank of its own. Requests are dealt to the engines by the tokens that they are expected to take
(`deal.py`), and every rank gets every sample back.

An engine that dies is ended, and every rank hears of it by an EngineLostError; `restart` brings it back, with the
weights of its folders. `generation.py` does that, and pushes the current ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist

from respec_trainer.collectives import agree
from respec_trainer.config import Config
from respec_trainer.placement import Placement
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.engine import RolloutEngine
from respec_trainer.rollout.fleet.deal import Dealer, begin, deal
from respec_trainer.rollout.fleet.feeder import Queue
from respec_trainer.rollout.fleet.pending import FleetPending
from respec_trainer.rollout.remote.link import HostAbsentError, job_store
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
            make_engine: number of an engine -> the engine, not yet started.
            control: a gloo group of the ranks that train, for small messages.
            device: "cuda", where colocated engines take turns with the trainer on the GPUs' memory, or "cpu".

        Raises EngineError on every rank if any engine did not start.
        """
        rank, placement = dist.get_rank(), Placement.of(config, dist.get_world_size() + config.rollout.engine_ranks)
        self.control = control
        self.shares_devices = config.rollout.placement == "colocated"
        # Engines give their memory back while the actor trains, and forget weights.
        self.sleeps = self.shares_devices and device == "cuda"
        self.resume = config.rollout.engine.resume == "tokens"
        self.dealer = Dealer(config.rollout.deal)
        self.room = config.rollout.engine.max_running_requests + config.rollout.engine.min_free_slots
        self.patience = config.rollout.engine.timeout
        self.owners = placement.owners
        self.hands_over = config.rollout.hand_over and len(self.owners) > 1
        self.store: dist.Store | None = None  # where engines' ranks count what they have taken of a common queue
        self.phases = 0
        self.index = self.owners.index(rank) if rank in self.owners else None
        self.engine = None if self.index is None else make_engine(self.index)
        self.counts: Counter[str] = Counter()  # of this rank's engine, since they were last taken
        self.logs: list[DecodeLog] = []  # of this rank's engine, from before it was last asked aside
        self.depth_state = ""  # state of its policy of draft steps, as it was last heard
        self.forgot = False  # whether the engine began anew since
        self.agree(self._start if self.engine else None)

    def start(self, requests: Sequence[Request]) -> FleetPending:
        """Hand each engine its share of the requests and return at once.

        With `rollout.hand_over` it is only what the engine has room for: the rest goes to whoever has room first.
        """
        shares = deal(self.dealer.units(requests, len(self.owners)), len(self.owners))
        waiting = []
        if self.hands_over:
            begun = [begin(share, self.room) for share in shares]
            shares, rests = zip(*begun, strict=True)
            waiting = sorted((unit for rest in rests for unit in rest), key=lambda unit: -unit.tokens)
        self.phases += 1
        queue = Queue(waiting, self.store, f"respec_queue_{self.phases}") if waiting else None
        return FleetPending(self, requests, [] if self.index is None else shares[self.index], queue)

    def ask_each(self, request: Request) -> list[Sample]:
        """Every engine's answer to the same request, on every rank. Rollouts' step logs do not hold it."""
        return self.agree((lambda: self._ask(request)) if self.engine else None)

    def check(self) -> None:
        """Raise EngineLostError on every rank if an engine died since it was last heard of."""
        self.agree(self._check if self.engine else None)

    def restart(self) -> None:
        """Start every dead engine anew, on another host where its own is gone.

        Raises EngineLostError on every rank if one does not start, HostAbsentError if no host comes for it in time.
        """
        absent = [text for text in self.agree(self._restart if self.engine else None) if text]
        if absent:
            raise HostAbsentError("; ".join(absent))

    def sleep(self) -> None:
        """Make room for the actor, where engines and actor share a GPU."""
        if self.sleeps:
            self.agree(self.engine.sleep if self.engine else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take that room back, in two stages; the weights must be pushed between them."""
        if self.sleeps:
            self.agree((lambda: self.engine.wake(part)) if self.engine else None)

    def take_counts(self) -> Counter[str]:
        """Sums over all engines since the last call: restarts, lost_tokens, resumed_tokens."""
        counts, self.counts = self.counts, Counter()
        return sum(self.agree(lambda: counts), Counter())

    def take_decode_log(self) -> list[DecodeLog]:
        """What the engines' batches did since the last call, on every rank; engines that log none add nothing.

        One log an engine, and one more for each time that a rollout of its was interrupted.
        """
        return [log for logs in self.agree(self._take_decode_log if self.engine else None) for log in logs]

    def restore_chooser(self) -> None:
        """Before requests: let an engine that began anew choose its draft steps by what was learnt before."""
        if self.forgot and self.depth_state:
            self.engine.restore_depth_chooser(self.depth_state)
        self.forgot = False

    def agree(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action`, None on ranks that own no engine; every rank gets every owner's result, or all raise."""
        results = agree(action, self.engine, self.control)
        return [results[owner] for owner in self.owners]

    def state_dict(self) -> dict[str, str]:
        """What the policy of draft steps has learnt, in this rank's engine."""
        return {"depth": self.depth_state}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.depth_state, self.forgot = state["depth"], True

    def shutdown(self) -> None:
        """End this rank's engine, for good."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine.release()

    def _start(self) -> None:
        self.engine.start()
        if self.hands_over:
            self.store = job_store(self.patience)

    def _ask(self, request: Request) -> Sample:
        self.logs = self._take_decode_log()
        answer = self.engine.submit([request]).collect()[0]
        self.logs += [DecodeLog(failures=log.failures) for log in (self.take_log(),) if log.failures]
        return answer

    def _take_decode_log(self) -> list[DecodeLog]:
        logs, self.logs = self.logs, []
        return [log for log in (*logs, self.take_log()) if len(log) or log.failures]

    def take_log(self) -> DecodeLog:
        log = self.engine.take_decode_log()
        if not self.forgot:
            self.depth_state = log.state
        return log

    def _check(self) -> None:
        if self.engine.failure is not None:
            raise self.engine.failure

    def _restart(self) -> str | None:
        """Why the engine has no host, if it has none."""
        if self.engine.failure is not None:
            self.counts["restarts"] += 1
            self.engine.shutdown()
            try:
                self.engine.start()
            except HostAbsentError as error:
                return str(error)
            self.forgot = True
        return None
