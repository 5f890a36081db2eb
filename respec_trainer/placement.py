"""Placement: which ranks of a job train the actor, and which hold engines.

colocated:     every rank trains; the first of each `rollout.engine.span` ranks also holds an engine.
disaggregated: the last `rollout.engine_ranks` ranks only hold engines, one for each span. The other ranks train. No
               process group contains a rank that only holds engines; training ranks have the same numbers in their
               process groups and in the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from respec_trainer.errors import ConfigError

if TYPE_CHECKING:
    from respec_trainer.config import Config


@dataclass(frozen=True)
class Placement:
    trainers: int  # number of ranks that train, the first ones
    engine_ranks: int  # number of ranks after them that only hold engines; 0: colocated
    span: int  # ranks that share one engine

    @classmethod
    def of(cls, config: Config, world_size: int) -> Placement:
        """Return the placement of a job of `world_size` ranks. Raises ConfigError if they cannot be divided."""
        rollout = config.rollout
        span = rollout.engine.span or rollout.engine.tp
        placement = cls(world_size - rollout.engine_ranks, rollout.engine_ranks, span)
        placement._check()
        return placement

    @property
    def described(self) -> str:
        """The ranks that train, in words for errors."""
        return f"{self.trainers} ranks that train" if self.engine_ranks else f"{self.trainers} ranks started"

    @property
    def engines(self) -> int:
        return (self.engine_ranks or self.trainers) // self.span

    @property
    def engine_launchers(self) -> list[int]:
        """The rank that starts each engine as its child process."""
        first = self.trainers if self.engine_ranks else 0
        return [first + index * self.span for index in range(self.engines)]

    @property
    def owners(self) -> list[int]:
        """The training rank of each engine that sends its requests and handles its errors."""
        if not self.engine_ranks:
            return self.engine_launchers
        return [index * self.trainers // self.engines for index in range(self.engines)]

    def trains(self, rank: int) -> bool:
        return rank < self.trainers

    def _check(self) -> None:
        if self.trainers < 1:
            raise ConfigError(
                f"rollout.engine_ranks={self.engine_ranks} of {self.trainers + self.engine_ranks} ranks started leave "
                "none to train: start more, or set fewer"
            )
        held = self.engine_ranks or self.trainers
        if held % self.span:
            ranks = f"rollout.engine_ranks={held}" if self.engine_ranks else f"the {self.described}"
            raise ConfigError(
                f"rollout.engine.span={self.span} does not divide {ranks}; set rollout.engine.span to a divisor of "
                f"{held}"
            )
        if self.engines > self.trainers:
            raise ConfigError(
                f"{self.engines} engines (rollout.engine_ranks={self.engine_ranks}, rollout.engine.span={self.span}) "
                f"are more than the {self.described}, each of which can feed one: set a larger span, or fewer "
                "engine_ranks"
            )


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError if a job of `world_size` ranks cannot run this configuration."""
    tp, placement = config.actor.parallel.tp, Placement.of(config, world_size)
    trainers = placement.trainers
    if trainers % tp:
        raise ConfigError(
            f"actor.parallel.tp={tp} does not divide the {placement.described}; start a multiple of {tp} "
            f"(deepspeed --num_gpus {tp + placement.engine_ranks} ...) or set actor.parallel.tp=1"
        )
    share = (trainers // tp) * config.objective.minibatches
    if config.samples_per_step % share:
        raise ConfigError(
            f"data.prompts_per_step x rollout.samples_per_prompt = {config.samples_per_step} samples do "
            f"not split over {trainers // tp} data-parallel ranks x objective.minibatches="
            f"{config.objective.minibatches}; make it a multiple of {share}"
        )
