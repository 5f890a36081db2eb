"""The drafter's part in the loop: what it learns from each step, and the weights that resync pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from respec_trainer.capture import Wanted
from respec_trainer.config import Config
from respec_trainer.drafter.format import load_drafter
from respec_trainer.drafter.online.online import OnlineDrafter
from respec_trainer.drafter.online.record import LearnerRank
from respec_trainer.drafter.vocabulary import FIXED
from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.algorithms import algorithm_of


class Learner(Protocol):
    """The seam between the loop and the drafter. `version` changes with the weights, and tells resync to push them.

    `wants` is what the actor's scoring pass is to capture for it; None: nothing.
    """

    version: str
    wants: Wanted | None

    def update(self, generating: Callable[[], bool]) -> None:
        """Learn from what was observed. Called while the engines generate, and told whether this rank's still does."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Take a step's samples, the actor's pass over this rank's share of them, and rewards [prompts, n]."""

    def metrics(self) -> dict[str, float | list[float]]:
        """What there is to say of the step."""

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights an engine can replace while it runs, under SGLang's names."""


class FrozenDrafter:
    """The drafter in `folder` as it is. It learns nothing, so it needs to see nothing.

    Raises ConfigError where the folder does not hold a drafter for the target of `hf_config`.
    """

    version = "drafter-0"
    wants = None

    def __init__(self, folder: Path | str, hf_config):
        drafter, _ = load_drafter(folder, hf_config, dtype=None)
        self.weights = {name: tensor for name, tensor in drafter.state_dict().items() if name not in FIXED}

    def update(self, generating: Callable[[], bool]) -> None:
        """Nothing: frozen."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Nothing: frozen."""

    def metrics(self) -> dict[str, float | list[float]]:
        return {}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()


class NoDrafter:
    """The learner of a run whose engine has no drafter, or one that it reads from its folder and keeps."""

    version = "none"
    wants = None

    def update(self, generating: Callable[[], bool]) -> None:
        """Nothing: there is no drafter."""

    def observe(self, samples: list[Sample], inference: Any, rewards: torch.Tensor, generation_seconds: float) -> None:
        """Nothing: there is no drafter."""

    def metrics(self) -> dict[str, float | list[float]]:
        return {}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()


def setup_learner(
    config: Config,
    hf_config,
    place: LearnerRank | None = None,
    control: dist.ProcessGroup | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Learner:
    """The learner that `speculation.algorithm` and `drafter.weighting` ask for.

    Args:
        place: this rank's; None: the only one, without a GPU. control: for small messages between all ranks.
        say: tells the user.
    """
    if not algorithm_of(config.speculation).pushes:
        return NoDrafter()
    if config.drafter.weighting == "none":
        return FrozenDrafter(config.drafter.path, hf_config)
    return OnlineDrafter(config, hf_config, place or LearnerRank(), control, say)
