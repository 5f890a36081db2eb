"""A small actor and a drafter for it, made once for all tests that run whole jobs: briefly trained, but real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes.forking import fork_engines
from tests.support.resyncs import save_random_pair
from tests.support.shared import made_once

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def forked_engines() -> None:
    fork_engines()


@pytest.fixture(scope="session")
def small_actor(tmp_path_factory) -> Path:
    """Make the quickstart's actor with a few training steps: tokenizer and shape are right, quality is not."""
    from respec_trainer.config_file import load_config
    from respec_trainer.recipes.small_actor import ActorRecipe, make_actor

    changes = ["teaching.steps=20", "teaching.warmup_steps=5", "prompts.train=256", "prompts.test=16"]
    recipe = load_config(REPOSITORY / "configs/quickstart-actor.yaml", changes, ActorRecipe)
    return made_once(tmp_path_factory, "actor", lambda folder: make_actor(recipe, folder))


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory) -> tuple[Path, Path]:
    """Make folders of a tiny random target and of a random drafter of its shape."""
    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def small_drafter(small_actor, tmp_path_factory) -> Path:
    """Make a random drafter: nearly every draft is rejected, so every path of verification runs."""
    import torch

    from respec_trainer.actor.loading import load_hf_config
    from respec_trainer.drafter.eagle3 import Eagle3Drafter
    from respec_trainer.drafter.format import save_drafter
    from respec_trainer.drafter.shape import DrafterShape

    hf_config = load_hf_config(small_actor)
    folder = tmp_path_factory.mktemp("small") / "drafter"
    drafter = Eagle3Drafter(DrafterShape.for_target(hf_config, draft_vocab_size=hf_config.vocab_size))
    save_drafter(drafter, torch.arange(hf_config.vocab_size), folder)
    return folder
