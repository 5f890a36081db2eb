"""Check that the folder in drafter.path can draft for the model: a check for each kind of folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from respec_trainer.actor.check import check_model
from respec_trainer.compat import resolve_device
from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of


def check_drafter(config: Config, hf_config) -> None:
    """Raise ConfigError unless the drafter's folder and the profile, if the algorithm has them, fit the run.

    Args:
        hf_config: the actor's.
    """
    algorithm = algorithm_of(config.speculation)
    if algorithm.folder is not None:
        FOLDER_CHECKS[algorithm.folder](config, hf_config)
    if algorithm.adapts:
        check_profile(config, hf_config)


def check_eagle3_folder(config: Config, hf_config) -> None:
    from respec_trainer.drafter.format import check_drafter_folder

    check_drafter_folder(Path(config.drafter.path), hf_config)
    check_rejection_sampling(config)


def check_draft_model(config: Config, hf_config) -> None:
    from respec_trainer.drafter.standalone import check_standalone

    device = resolve_device(config.run.device)
    drafter = check_standalone(config.drafter.path, config.model.path, hf_config, device)
    check_model(drafter, tp=1, model_key="drafter.path")  # the engine can load every model that the actor supports


FOLDER_CHECKS: dict[DrafterFolder, Callable[..., None]] = {
    DrafterFolder.EAGLE3: check_eagle3_folder,
    DrafterFolder.MODEL: check_draft_model,
}


def check_profile(config: Config, hf_config) -> None:
    """Raise ConfigError unless the profile of an adaptive run fits it."""
    from respec_trainer.speculation.profiling.settings import depth_settings

    depth_settings(config, hf_config, resolve_device(config.run.device))


def check_rejection_sampling(config: Config) -> None:
    """Raise ConfigError if rejection sampling is on and the drafter's vocabulary is smaller than the target's."""
    if not config.speculation.rejection_sampling:
        return
    drafter = json.loads((Path(config.drafter.path) / "config.json").read_text())
    size, full = drafter["draft_vocab_size"], drafter["vocab_size"]
    if size != full:
        raise ConfigError(
            f"speculation.rejection_sampling needs a drafter of the full vocabulary, but draft_vocab_size in "
            f"{config.drafter.path} is {size} of {full}; train one with all {full} tokens, or set "
            "speculation.rejection_sampling=false"
        )
