"""The drafter's part in the loop: what it learns from each step, and the weights that resync pushes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from respec_trainer.config import Config
from respec_trainer.drafter.format import FIXED, load_drafter
from respec_trainer.rollout.sample import Sample


class Learner(Protocol):
    """The seam between the loop and the drafter. `version` changes with the weights, and tells resync to push them."""

    version: str

    def update(self) -> None:
        """Learn from what was observed. Called while the engines generate."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor) -> None:
        """Take a step's samples, the actor's pass over this rank's share of them, and rewards [prompts, n]."""

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights an engine can replace while it runs, under SGLang's names."""


class FrozenDrafter:
    """The drafter in `folder` as it is. It learns nothing, so it needs to see nothing.

    Raises ConfigError where the folder does not hold a drafter for the target of `hf_config`.
    """

    version = "drafter-0"

    def __init__(self, folder: Path | str, hf_config):
        drafter, _ = load_drafter(folder, hf_config, dtype=None)
        self.weights = {name: tensor for name, tensor in drafter.state_dict().items() if name not in FIXED}

    def update(self) -> None:
        """Nothing: frozen."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor) -> None:
        """Nothing: frozen."""

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()


class NoDrafter:
    """The learner of a run whose engine has no drafter, or one that it reads from its folder and keeps."""

    version = "none"

    def update(self) -> None:
        """Nothing: there is no drafter."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor) -> None:
        """Nothing: there is no drafter."""

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()


def setup_learner(config: Config, hf_config) -> Learner:
    """The learner that `speculation.algorithm` and `drafter.weighting` ask for."""
    if config.speculation.algorithm != "eagle3":
        return NoDrafter()
    return FrozenDrafter(config.drafter.path, hf_config)  # weighting "none", the only one
