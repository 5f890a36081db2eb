"""The drafter's part in the loop: what it learns from each step, and the weights that resync pushes.

`Learner` is the seam between loop and drafter; `setup.py` chooses one, `online_drafter.py` holds the one that learns.
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
from respec_trainer.rollout.sample import Sample


@dataclass(frozen=True)
class LearnerRank:
    """This rank among those that train: which of `dp` shares of a step's samples it scores, and its device."""

    rank: int = 0
    world_size: int = 1
    dp: int = 1
    dp_rank: int = 0
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, topology) -> LearnerRank:
        return cls(topology.rank, topology.world_size, topology.dp, topology.dp_rank, topology.device)


class Learner:
    """A learner that does nothing, for others to override what they do. Every rank calls every method, in one order."""

    version = "none"  # changes with the weights, and tells resync to push them
    wants: Wanted | None = None  # what the actor's scoring pass is to capture for it; None: nothing
    stateful = False  # whether a checkpoint holds its state; then it has state_dict and load_state_dict

    def update(self, generating: Callable[[], bool]) -> None:
        """Learn from what was observed, while `generating()`: whether this rank's engine still draws responses."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Take a step's samples, the actor's pass over this rank's share of them, and rewards [prompts, n]."""

    def metrics(self) -> dict[str, float | list[float]]:
        """Metrics of the step, by name."""
        return {}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights an engine can replace while it runs, under SGLang's names."""
        yield from ()

    def copy_drafter(self) -> Callable[[Path], None]:
        """Copy the drafter as it is now. What is returned writes the copy into a new folder, at any time."""
        raise NotImplementedError(f"{type(self).__name__} has no drafter to copy")


class NoDrafter(Learner):
    """The learner of a run whose engine has no drafter, or one that it reads from its folder and keeps."""


class FrozenDrafter(Learner):
    """The drafter in `folder` as it is. It learns nothing, so it needs to see nothing.

    Raises ConfigError where the folder does not hold a drafter for the target of `hf_config`.
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
