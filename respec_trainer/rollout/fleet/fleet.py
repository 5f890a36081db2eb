"""RolloutFleet: all engines of the run, as one trainer rank sees them.

Some ranks own an engine (`placement.py` decides which): they start it, submit its requests and end it, whether it is
their child or runs on a rank of its own. Requests are dealt to the engines by their expected tokens (`deal.py`), and
every rank receives every sample.

If an engine dies, every rank raises EngineLostError. `restart` starts the engine again with the weights of its folders;
`generation.py` calls it, and then pushes the current weights.
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
    """All engines of the run, running once this is made. `engine` is this rank's own; None on ranks that own none."""

    def __init__(
        self,
        config: Config,
        make_engine: Callable[[int], RolloutEngine],
        control: dist.ProcessGroup,
        device: str,
    ):
        """Start this rank's engine, if it owns one.

        Args:
            make_engine: makes the engine of a given number, not yet started.
            control: a gloo group of the ranks that train, for small messages.
            device: "cuda", where colocated engines and the trainer use the GPUs' memory in turn, or "cpu".

        Raises EngineError on every rank if any engine did not start.
        """
        rank, placement = dist.get_rank(), Placement.of(config, dist.get_world_size() + config.rollout.engine_ranks)
        self.control = control
        self.shares_devices = config.rollout.placement == "colocated"
        # Engines release their memory while the actor trains, and lose their weights.
        self.sleeps = self.shares_devices and device == "cuda"
        self.resume = config.rollout.engine.resume == "tokens"
        self.dealer = Dealer(config.rollout.deal)
        self.room = config.rollout.engine.max_running_requests + config.rollout.engine.min_free_slots
        self.timeout = config.rollout.engine.timeout
        self.owners = placement.owners
        self.hands_over = config.rollout.hand_over and len(self.owners) > 1
        self.store: dist.Store | None = None  # counts the units that the ranks have taken from a common queue
        self.phases = 0
        self.index = self.owners.index(rank) if rank in self.owners else None
        self.engine = None if self.index is None else make_engine(self.index)
        self.counts: Counter[str] = Counter()  # of this rank's engine, since the last `take_counts`
        self.logs: list[DecodeLog] = []  # of this rank's engine, taken before its last `ask_each`
        self.depth_state = ""  # latest state of its depth chooser
        self.must_restore = False  # the engine started again and has not received `depth_state` yet
        self.agree(self._start if self.engine else None)

    def start(self, requests: Sequence[Request]) -> FleetPending:
        """Submit its share of the requests to each engine and return at once.

        With `rollout.hand_over` an engine gets only what it has room for; the rest goes to the engines that have room
        first.
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
        """Return every engine's answer to the same request, on every rank. The decode logs leave it out."""
        return self.agree((lambda: self._ask(request)) if self.engine else None)

    def check(self) -> None:
        """Raise EngineLostError on every rank if an engine has died."""
        self.agree(self._check if self.engine else None)

    def restart(self) -> None:
        """Start every dead engine again, on another host if its own is gone.

        Raises EngineLostError on every rank if one does not start, HostAbsentError if no host offers itself in time.
        """
        absent = [text for text in self.agree(self._restart if self.engine else None) if text]
        if absent:
            raise HostAbsentError("; ".join(absent))

    def sleep(self) -> None:
        """Release the engines' GPU memory for the actor, if engines and actor share a GPU."""
        if self.sleeps:
            self.agree(self.engine.sleep if self.engine else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate that memory again, in two stages; push the weights between them."""
        if self.sleeps:
            self.agree((lambda: self.engine.wake(part)) if self.engine else None)

    def take_counts(self) -> Counter[str]:
        """Return sums over all engines since the last call: restarts, lost_tokens, resumed_tokens."""
        counts, self.counts = self.counts, Counter()
        return sum(self.agree(lambda: counts), Counter())

    def take_decode_log(self) -> list[DecodeLog]:
        """Return the engines' logs since the last call, on every rank; engines that keep none add nothing.

        There is one log for each engine, and one more for each `ask_each` during its rollout.
        """
        return [log for logs in self.agree(self._take_decode_log if self.engine else None) for log in logs]

    def restore_chooser(self) -> None:
        """Send a restarted engine the latest state of its depth chooser; call it before submitting requests."""
        if self.must_restore and self.depth_state:
            self.engine.restore_depth_chooser(self.depth_state)
        self.must_restore = False

    def agree(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action`, which is None on ranks without an engine; all ranks get all owners' results, or all raise."""
        results = agree(action, self.engine, self.control)
        return [results[owner] for owner in self.owners]

    def state_dict(self) -> dict[str, str]:
        """Return the state of the depth chooser of this rank's engine."""
        return {"depth": self.depth_state}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.depth_state, self.must_restore = state["depth"], True

    def shutdown(self) -> None:
        """End this rank's engine, for good."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine.release()

    def _start(self) -> None:
        self.engine.start()
        if self.hands_over:
            self.store = job_store(self.timeout)

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
        if not self.must_restore:
            self.depth_state = log.state
        return log

    def _check(self) -> None:
        if self.engine.failure is not None:
            raise self.engine.failure

    def _restart(self) -> str | None:
        """Restart this rank's engine if it is dead; return an error text if it has no host."""
        if self.engine.failure is not None:
            self.counts["restarts"] += 1
            self.engine.shutdown()
            try:
                self.engine.start()
            except HostAbsentError as error:
                return str(error)
            self.must_restore = True
        return None
