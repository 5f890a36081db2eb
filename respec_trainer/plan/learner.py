"""Estimate the Online Learner's memory: models and activations on the GPU, rollouts to learn from on the host."""

from __future__ import annotations

from respec_trainer.config import Config
from respec_trainer.drafter.online.buffer import MB
from respec_trainer.dtypes import DTYPES
from respec_trainer.plan.part import PHASES, Part, Phase
from respec_trainer.plan.places import Layout
from respec_trainer.plan.sizes import DrafterSizes
from respec_trainer.speculation.algorithms import algorithm_of


def learns(config: Config) -> bool:
    return algorithm_of(config.speculation).learns and config.drafter.weighting != "none"


def learner_parts(config: Config, drafter: DrafterSizes | None, longest: int) -> list[Part]:
    """Return the learner's parts of the memory of a GPU that trains, for samples of `longest` tokens."""
    settings = config.drafter
    if drafter is None or not learns(config):
        return []
    tokens = settings.micro_batch_size * longest
    fixed = drafter.learning(settings.matrix_lr is not None, settings.compare_frozen)
    phase: Phase = "generate" if settings.mode == "async" else "train"
    how = f"{drafter.parameters / 1e6:.0f}e6 numbers, float32, with gradients and moments"
    activations = drafter.activations(tokens, settings.unroll)
    return [
        Part("learner: drafter, optimizer", fixed, PHASES, how),
        Part("learner: activations", activations, (phase,), f"{settings.unroll} steps of {tokens:,} tokens"),
    ]


def learner_problems(config: Config, drafter: DrafterSizes | None, layout: Layout, longest: int) -> list[str]:
    """Check that `drafter.memory_mb` holds the learner's models and the responses of one update at their longest.

    Returns error texts; an empty list if there is no problem.
    """
    if drafter is None or not learns(config):
        return []
    settings, width = config.drafter, DTYPES[config.model.dtype].itemsize
    rows = min(-(-settings.batch_size // layout.placement.trainers), config.samples_per_step)
    fixed = drafter.learning(settings.matrix_lr is not None, settings.compare_frozen)
    needed = -(-(fixed + rows * drafter.row(longest, width) + drafter.snapshot(rows * longest, width)) // MB)
    if needed <= settings.memory_mb:
        return []
    return [
        f"drafter.memory_mb={settings.memory_mb} is less than the {needed} MB that the drafter, its optimizer and the "
        f"{rows} responses of {longest} tokens that one update takes on each rank may need; raise it, or lower "
        "drafter.batch_size"
    ]
