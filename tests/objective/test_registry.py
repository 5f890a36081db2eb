from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.errors import ConfigError
from respec_trainer.objective.grpo import GRPO
from respec_trainer.objective.registry import OBJECTIVES, RunObjective, setup_objective


def test_grpo_is_the_default_and_follows_its_section():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    half = torch.tensor([[-0.5, 0.5, 0.5, -0.5]])
    norm = setup_objective(ObjectiveConfig())
    torch.testing.assert_close(norm.advantages(rewards), half * 3**0.5)  # the sample std is sqrt(1/3)
    mean = setup_objective(ObjectiveConfig(kind="grpo", advantage="group_mean", aggregation="sequence"))
    torch.testing.assert_close(mean.advantages(rewards), half)
    mask = torch.tensor([[True, True], [False, True]])
    assert torch.equal(norm.token_weights(mask, tokens=3.0, sequences=2.0), mask / 3)
    assert torch.equal(mean.token_weights(mask, tokens=3.0, sequences=2.0), torch.tensor([[0.25, 0.25], [0.0, 0.5]]))


def test_an_unknown_objective_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="objective.kind=gprol: .*did you mean 'grpo'"):
        setup_objective(ObjectiveConfig(kind="gprol"))


def test_advantages_of_another_shape_are_refused():
    flat = replace(GRPO, advantages=lambda rewards, config: rewards.flatten())
    with pytest.raises(ValueError, match=r"objective.kind=grpo gave advantages \(4,\) for rewards \(2, 2\)"):
        RunObjective(flat, ObjectiveConfig()).advantages(torch.zeros(2, 2))


def test_the_default_of_the_configuration_is_registered():
    assert ObjectiveConfig().kind in OBJECTIVES
