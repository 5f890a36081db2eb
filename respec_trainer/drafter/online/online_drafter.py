"""OnlineDrafter: a drafter that learns from the actor's own rollouts while the engines generate the next ones.

An iteration in mode "async":

    update      measure the drafter that the engines used for the stored rollouts, on the newest of them; then train
                while the engines generate
    observe     store this step's rollouts
    (resync)    push the trained drafter to the engines

In mode "sync", `observe` measures and trains, on the rollouts of the step itself, while the engines wait.

The learner does not affect the actor: it reads copies in host memory and has random generators of its own. An update
that is not finite is dropped; after `drafter.max_bad_updates` in a row the drafter is frozen, and the run goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from respec_trainer.capture import Wanted
from respec_trainer.collectives import reduce
from respec_trainer.config import Config
from respec_trainer.drafter.format import load_drafter, save_drafter
from respec_trainer.drafter.loss import drafted_weights
from respec_trainer.drafter.online.buffer import MB, ReplayBuffer
from respec_trainer.drafter.online.cadence import Cadence
from respec_trainer.drafter.online.learner import Learner, LearnerRank
from respec_trainer.drafter.online.measure import measure
from respec_trainer.drafter.online.recall import recall
from respec_trainer.drafter.online.record import StepRecord
from respec_trainer.drafter.online.rows import rows_of_step
from respec_trainer.drafter.online.stored import Row
from respec_trainer.drafter.online.updates import DrafterUpdates, Micro, batches
from respec_trainer.errors import ConfigError
from respec_trainer.rollout.sample import Sample

MEASURED = 64  # newest responses to measure the drafter on, over all ranks: some hundreds of verify passes


class OnlineDrafter(Learner):
    """The drafter of `drafter.path`, with float32 weights. Every rank calls every method, in the same order.

    Args:
        rank_info: this rank and its share. control: a gloo group of all ranks; None: the default group.
        notify: informs the user.

    Raises ConfigError if the folder does not hold a drafter for the target of `hf_config`, or `drafter.memory_mb` does
    not hold the drafter and its optimizer.
    """

    stateful = True

    def __init__(
        self,
        config: Config,
        hf_config,
        rank_info: LearnerRank,
        control: dist.ProcessGroup | None,
        notify: Callable[[str], None],
    ):
        self.config, self.settings, self.rank_info = config, config.drafter, rank_info
        self.control, self.notify = control, notify
        drafter, ids = load_drafter(config.drafter.path, hf_config, dtype=torch.float32)
        self.drafter = drafter.to(rank_info.device)
        self.wants = Wanted(drafter.shape.feature_layers, ids)
        self.temperature = config.rollout.sampling.temperature
        self.updates = DrafterUpdates(self.drafter, self.settings, self.temperature, self._bf16())
        self.served = self._as_served()
        self.began_as = self._as_served() if self.settings.compare_frozen else None  # the drafter before any update
        self.measured_rows = -(-MEASURED // rank_info.world_size)
        seeds = config.run.seed, rank_info.rank
        self.buffer = ReplayBuffer(self._room(), self.settings.retention, *seeds, self.measured_rows, self._least)
        self.cadence = Cadence(self.settings.cadence, self.settings.interval, self.settings.delta)
        self.record = StepRecord(ids, hf_config.vocab_size)
        self.number = 0  # number of the weights' version
        self.served_version = self.version
        self.bad_updates = 0  # updates in a row that were not finite
        self.frozen = False
        self.accept_history: list[float] = []

    @property
    def version(self) -> str:
        return f"drafter-{self.number}"

    def update(self, generating: Callable[[], bool]) -> None:
        """Learn as long as `generating()`: True while this rank's engine, if it has one, draws responses."""
        watch = _Watch(generating)
        if self.settings.mode == "async":
            self._measure(watch)
        if self.served_version != self.version:
            self.served, self.served_version = self._as_served(), self.version
        if self.settings.mode == "async":
            self._train(may_go_on=lambda: bool(self._most([watch()])[0]))
            self.record.exposed = watch.exposed()

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Store this rank's share of a step's samples, with what `actor.infer` captured of it. rewards: [prompts, n].

        Raises ConfigError if `drafter.memory_mb` is too small for one update's responses.
        """
        step = self.record.iteration + 1
        found = rows_of_step(samples, inference, rewards, self.settings, self.rank_info, step)
        found.refused += self.buffer.add(found.rows, self._share_of_batch)
        self.record.store(found, self.buffer.newest())
        self.record.observe(samples, self.notify)
        self.accept_history.append(self.record.accept_length)
        self.cadence.note(self.record.accept_length, generation_seconds)
        assert self.nbytes <= self.settings.memory_mb * MB
        if self.settings.mode == "sync":
            watch = _Watch(lambda: False)
            self._measure(watch)
            self._train(may_go_on=lambda: True)
            self.record.exposed = watch.exposed()

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.drafter.state_dict().items()

    def copy_drafter(self) -> Callable[[Path], None]:
        drafter, ids = copy.deepcopy(self.drafter).cpu(), self.wants.draft_ids
        return lambda folder: save_drafter(drafter, ids, folder, torch.float32)

    def metrics(self) -> dict[str, float | list[float]]:
        """The `drafter/*` metrics since the last call, and `time/learn_exposed`; the same on every rank."""
        found = self.record.metrics(self.config, self._sum, self._least)
        buffered, held = self._sum([self.buffer.nbytes, self.nbytes])
        found |= {"drafter/buffer_mb": buffered / MB, "drafter/memory_mb": held / MB}
        return found | {"drafter/frozen": int(self.frozen)}

    @property
    def nbytes(self) -> int:
        """Bytes that this rank's learner holds, on any device: rollouts, drafters, gradients, optimizer moments."""
        return self.buffer.nbytes + self._fixed_bytes()

    def _fixed_bytes(self) -> int:
        drafters = [drafter for drafter in (self.drafter, self.served, self.began_as) if drafter is not None]
        return self.updates.nbytes + sum(tensor.nbytes for d in drafters for tensor in d.state_dict().values())

    def _room(self) -> int:
        """Return the bytes that the budget leaves for rollouts."""
        room = self.settings.memory_mb * MB - self._fixed_bytes()
        if room <= 0:
            needed = -(-self._fixed_bytes() // MB)
            raise ConfigError(
                f"drafter.memory_mb={self.settings.memory_mb} is less than the {needed} MB that the drafter and its "
                f"optimizer take on each rank: set it to {needed} plus the MB for the rollouts to learn from"
            )
        return room

    def _measure(self, watch: _Watch) -> None:
        rows = self.buffer.newest(self.measured_rows)
        watch()
        self.record.measured = measure(self.served, self.wants.draft_ids, rows, self.config, self.rank_info.device)
        if self.began_as is not None:
            frozen = measure(self.began_as, self.wants.draft_ids, rows, self.config, self.rank_info.device)
            self.record.measured_frozen = frozen

    def _train(self, may_go_on: Callable[[], bool]) -> None:
        """Train on this training's share of the buffer while `may_go_on()`, which every rank has to call."""
        if self.frozen:
            return
        (due,) = self._most([self.cadence.due()])
        if not due or not may_go_on():
            return
        began = time.perf_counter()
        rows = self.buffer.choose(self.cadence.share)
        (count,) = self._most([-(-len(rows) // self._share_of_batch)])
        applied = 0
        for batch in batches(rows, self._share_of_batch, int(count)):
            outcome = self.updates.step(self._micros(batch), self._totals(batch), may_go_on)
            self.record.outcome(outcome, self.updates)
            if outcome.applied and not self._keep_if_finite():
                applied = 0
                break
            applied += outcome.applied
            self.bad_updates = 0 if outcome.finite else self.bad_updates + 1
            if self.bad_updates >= self.settings.max_bad_updates:
                self._freeze()
                break
            if not outcome.whole:
                break
        if applied:
            self.number += 1
            self.record.trained(self.version)
        self.cadence.trained(self._sum([time.perf_counter() - began])[0] / self.rank_info.world_size)

    def _keep_if_finite(self) -> bool:
        """Return whether the weights are finite. If not, restore the served weights and make a new optimizer."""
        if all(weight.isfinite().all() for weight in self.drafter.parameters()):
            return True
        self.drafter.load_state_dict(self.served.state_dict())
        self.updates = DrafterUpdates(self.drafter, self.settings, self.temperature, self._bf16())
        self.record.overflowed()
        self.bad_updates += 1
        if self.bad_updates >= self.settings.max_bad_updates:
            self._freeze()
        return False

    def _micros(self, rows: list[Row]) -> list[Callable[[], Micro | None]]:
        """Return functions that make the micro-batches of `rows`: the same number on every rank, some of them empty."""
        size = self.settings.micro_batch_size
        parts = [rows[start : start + size] for start in range(0, self._share_of_batch, size)]
        return [partial(self._recall, part) for part in parts]

    def _totals(self, rows: list[Row]) -> list[float]:
        """Return the weights of the tokens drafted at each depth in an update of which `rows` are this rank's."""
        responses, weights = (torch.tensor([getattr(row, name) for row in rows]) for name in ("response", "weight"))
        return self._sum(drafted_weights(responses, weights, self.settings.unroll).tolist())

    def _recall(self, rows: list[Row]) -> Micro | None:
        return recall(rows, self.temperature, self.rank_info.device) if rows else None

    def _freeze(self) -> None:
        self.frozen = True
        self.notify(
            f"{self.bad_updates} drafter updates in a row were not finite (drafter.max_bad_updates): the drafter stays "
            f"at {self.version} and trains no more; lower drafter.lr in the next run"
        )

    @torch.no_grad()
    def _as_served(self):
        """Copy the drafter as the engines hold it: weights rounded to the run's dtype, but stored in float32."""
        served = copy.deepcopy(self.drafter).requires_grad_(False)
        if self.config.model.dtype == "bf16":
            for weight in served.parameters():
                weight.copy_(weight.bfloat16())
        return served

    @property
    def _share_of_batch(self) -> int:
        """The number of responses that one update takes from each rank."""
        return -(-self.settings.batch_size // self.rank_info.world_size)

    def _bf16(self) -> bool:
        return self.rank_info.device.type == "cuda" and self.config.model.dtype == "bf16"

    def _sum(self, values: list[float]) -> list[float]:
        return reduce(values, "sum", self.control)

    def _most(self, values: list[float]) -> list[float]:
        return reduce(values, "max", self.control)

    def _least(self, values: list[float]) -> list[float]:
        return reduce(values, "min", self.control)

    def state_dict(self) -> dict:
        """The state of this rank's learner: weights, optimizer, buffer (each rank has another), cadence, counters."""
        return {
            "drafter": self.drafter.state_dict(),
            "served": self.served.state_dict(),
            "began_as": self.began_as.state_dict() if self.began_as is not None else None,
            "updates": self.updates.state_dict(),
            "buffer": self.buffer.state_dict(),
            "cadence": self.cadence.state_dict(),
            "learned_from": dict(self.record.learned_from),
            "iteration": self.record.iteration,
            "accept_history": list(self.accept_history),
            "numbers": [self.number, self.bad_updates, self.frozen],
            "served_version": self.served_version,
        }

    def load_state_dict(self, state: dict) -> None:
        self.drafter.load_state_dict(state["drafter"])
        self.served.load_state_dict(state["served"])
        if self.began_as is not None and state["began_as"] is not None:
            self.began_as.load_state_dict(state["began_as"])
        self.updates.load_state_dict(state["updates"])
        self.buffer.load_state_dict(state["buffer"])
        self.cadence.load_state_dict(state["cadence"])
        self.record.learned_from, self.record.iteration = dict(state["learned_from"]), state["iteration"]
        self.accept_history = list(state["accept_history"])
        self.number, self.bad_updates, self.frozen = state["numbers"]
        self.served_version = state["served_version"]


class _Watch:
    """Checks whether the engine still generates, and records the last time that it did."""

    def __init__(self, generating: Callable[[], bool]):
        self.generating, self.seen = generating, time.perf_counter()

    def __call__(self) -> bool:
        running = self.generating()
        if running:
            self.seen = time.perf_counter()
        return running

    def exposed(self) -> float:
        """Return the seconds since a check last found generation running, 0 if it still runs.

        Generation ended after that check, so this is an upper bound of the time that learning added.
        """
        return 0.0 if self() else time.perf_counter() - self.seen
