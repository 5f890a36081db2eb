"""Learner: the interface between the training loop and the drafter, and the learners that do not train.

A learner learns from each step's samples and provides the weights that resync pushes. `setup.py` chooses one;
`online_drafter.py` holds the one that trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from respec_trainer.capture import Wanted
from respec_trainer.drafter.format import load_drafter
from respec_trainer.drafter.vocabulary import FIXED
from respec_trainer.rollout.batch import rows_of_rank
from respec_trainer.rollout.sample import Sample


@dataclass(frozen=True)
class LearnerRank:
    """This rank among those that train, its share of a step's samples, and its device."""

    rank: int = 0
    world_size: int = 1
    dp: int = 1
    dp_rank: int = 0
    minibatches: int = 1  # objective.minibatches, of which each rank has an equal part
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, topology, minibatches: int) -> LearnerRank:
        return cls(topology.rank, topology.world_size, topology.dp, topology.dp_rank, minibatches, topology.device)

    def rows(self, total: int) -> list[int]:
        """Return the numbers of this rank's samples among the `total` of a step, in order."""
        return rows_of_rank(total, self.minibatches, self.dp, self.dp_rank)


class Learner:
    """Base class: a learner that does nothing. Every rank calls every method, in the same order."""

    version = "none"  # changes with the weights; resync pushes them when it has changed
    wants: Wanted | None = None  # what the actor's scoring pass captures for the learner; None: nothing
    stateful = False  # True: a checkpoint holds its state, and it has state_dict and load_state_dict

    def update(self, generating: Callable[[], bool]) -> None:
        """Learn from the observed samples as long as `generating()`: True while this rank's engine draws responses."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Take a step's samples, the actor's pass over this rank's share of them, and rewards [prompts, n]."""

    def metrics(self) -> dict[str, float | list[float]]:
        """The metrics of the step, by name."""
        return {}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that a running engine can replace, under SGLang's names."""
        yield from ()

    def copy_drafter(self) -> Callable[[Path], None]:
        """Copy the drafter as it is now. Returns a function that writes the copy into a new folder, now or later."""
        raise NotImplementedError(f"{type(self).__name__} has no drafter to copy")


class NoDrafter(Learner):
    """The learner of a run whose engine has no drafter, or a drafter that no push replaces."""


class FrozenDrafter(Learner):
    """The drafter in `folder`, pushed but never trained.

    Raises ConfigError if the folder does not hold a drafter for the target of `hf_config`.
    """

    version = "drafter-0"

    def __init__(self, folder: Path | str, hf_config):
        self.folder = folder
        drafter, _ = load_drafter(folder, hf_config, dtype=None)
        self.weights = {name: tensor for name, tensor in drafter.state_dict().items() if name not in FIXED}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()

    def copy_drafter(self) -> Callable[[Path], None]:
        return partial(shutil.copytree, self.folder)
