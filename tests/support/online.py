"""An online drafter on one rank, its target model and its rollouts, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from respec_trainer.drafter.format import save_drafter
from respec_trainer.drafter.online.online_drafter import OnlineDrafter
from respec_trainer.drafter.online.setup import setup_learner
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.learners import random_samples, score
from tests.support.models import tiny_model, tiny_run_config

LENGTHS = [(3, 6 + i % 5) for i in range(16)]
REWARDS = (torch.arange(16) % 3 == 0).float().view(4, 4)


def save_start(root: Path) -> Path:
    """Save the drafter that learners begin with, and return its folder."""
    save_drafter(tiny_drafter(), DRAFT_IDS, root / "drafter")
    return root / "drafter"


def target_model():
    """The transformers model whose responses and scores the learners get."""
    return tiny_model(target_config())


def make_learner(folder: Path, **changes) -> OnlineDrafter:
    """Make a learner from the drafter in `folder`. `changes` are keys of section drafter; `said` gets its messages."""
    keys = {"path": str(folder), "weighting": "reward", "batch_size": 8, "micro_batch_size": 3, "unroll": 3}
    keys |= {"lr": 3e-3, "matrix_lr": None} | changes
    config = tiny_run_config(
        "actor", {"speculation.algorithm": "eagle3"} | {f"drafter.{key}": value for key, value in keys.items()}
    )
    learner = setup_learner(config, target_config(), notify=(said := []).append)
    learner.said = said
    return learner


def iterate(learner, model, step: int, rewards=REWARDS, generating=lambda: True, samples=None) -> dict:
    """Run one iteration as trainer.py does, and return its metrics."""
    drafter = learner.version
    learner.update(generating)
    samples = samples or random_samples(LENGTHS, step, drafter)
    learner.observe(samples, score(model, samples), rewards, 10.0)
    return learner.metrics()


def weights(learner) -> dict:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
