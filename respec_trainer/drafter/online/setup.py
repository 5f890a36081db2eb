"""The factory of a run's learner."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from respec_trainer.config import Config
from respec_trainer.drafter.online.learner import FrozenDrafter, Learner, LearnerRank, NoDrafter
from respec_trainer.drafter.online.online_drafter import OnlineDrafter
from respec_trainer.speculation.algorithms import algorithm_of


def setup_learner(
    config: Config,
    hf_config,
    rank_info: LearnerRank | None = None,
    control: dist.ProcessGroup | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Learner:
    """Make the learner that `speculation.algorithm` and `drafter.weighting` ask for.

    Args:
        rank_info: this rank and its share; None: the only rank, without a GPU.
        control: a gloo group of all ranks; None: the default group.
        notify: informs the user.
    """
    if not algorithm_of(config.speculation).pushes:
        return NoDrafter()
    if config.drafter.weighting == "none":
        return FrozenDrafter(config.drafter.path, hf_config)
    return OnlineDrafter(config, hf_config, rank_info or LearnerRank(), control, notify)
