from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.advantages import group_advantages

REWARDS = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 6.0]])
NORM, MEAN = ObjectiveConfig(advantage="group_norm"), ObjectiveConfig(advantage="group_mean")
NAN = float("nan")
both = pytest.mark.parametrize("config", [NORM, MEAN], ids=["norm", "mean"])


def test_group_mean_subtracts_each_groups_mean():
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-1.0, -1.0, -1.0, 3.0]])
    torch.testing.assert_close(group_advantages(REWARDS, MEAN), expected)


def test_group_norm_makes_every_group_count_alike():
    advantages = group_advantages(REWARDS, NORM)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2))
    torch.testing.assert_close(advantages.std(1), torch.ones(2))
    assert advantages[1, 3] == pytest.approx(1.5)  # 3 / std of (-1, -1, -1, 3) = 3 / 2


@both
def test_whole_numbers_are_rewards_too(config):
    advantages = group_advantages(torch.tensor([[0, 1, 1, 0], [2, 2, 2, 6]]), config)
    assert advantages.dtype == torch.float32
    assert torch.equal(advantages, group_advantages(REWARDS, config))


@both
def test_equal_rewards_teach_nothing_exactly(config):
    # 0.1 is no binary fraction: the mean of seven is not 0.1, and dividing by the std would make it large.
    rewards = torch.full((2, 7), 0.1)
    assert torch.equal(group_advantages(rewards, config), torch.zeros(2, 7))


@both
@pytest.mark.parametrize("scale", [1e-12, 1.0, -3.0, 1e12])
@pytest.mark.parametrize("difference", [1.2e-7, 4e-7])
def test_rewards_that_differ_in_rounding_teach_nothing_whatever_their_size(config, scale, difference):
    rewards = scale * torch.tensor([[1.0, 1.0 + difference, 1.0, 1.0 - difference]])
    assert rewards.unique().numel() > 1, "in float32 they must differ"
    assert torch.equal(group_advantages(rewards, config), torch.zeros(1, 4))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rewards_that_differ_little_are_distinguished_whatever_their_size(scale):
    rewards = scale * torch.tensor([[1.0, 1.00001, 1.0, 1.00001]])
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0]]) * 0.75**0.5  # the sample std of four such numbers is larger
    torch.testing.assert_close(group_advantages(rewards, NORM), expected, rtol=0.02, atol=0)


def test_skipped_samples_count_for_nothing():
    rewards = np.array([[1.0, NAN, 4.0, 0.5], [2.0, 3.0, NAN, NAN], [0.0, 1.0, 5.0, 0.0], [NAN, 7.0, 7.0, 9.0]])
    advantages, centered = (group_advantages(torch.tensor(rewards), config) for config in (NORM, MEAN))
    for row, group in enumerate(rewards):
        scored = [reward for reward in group if reward == reward]
        mean, std = np.mean(scored), np.std(scored, ddof=1)
        expected = [0.0 if reward != reward else reward - mean for reward in group]
        assert centered[row].tolist() == pytest.approx(expected, abs=1e-6)
        assert advantages[row].tolist() == pytest.approx([value / std for value in expected], abs=1e-6)
        assert all(advantages[row, column] == 0 for column in np.flatnonzero(np.isnan(group)))


@both
def test_skipped_samples_do_not_change_other_groups(config):
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    whole = group_advantages(rewards, config)
    rewards[1, 2] = rewards[4, :5] = NAN
    assert torch.equal(group_advantages(rewards, config)[[0, 2, 3]], whole[[0, 2, 3]])


@both
def test_groups_with_fewer_than_two_scored_samples_teach_nothing(config):
    rewards = torch.tensor([[NAN, NAN, NAN], [NAN, 3.0, NAN]])
    assert torch.equal(group_advantages(rewards, config), torch.zeros(2, 3))


@both
@pytest.mark.parametrize("rewards", [[0.0, float("inf"), 1.0], [float("-inf")] * 3])
def test_a_reward_without_bound_is_not_hidden(config, rewards):
    assert group_advantages(torch.tensor([rewards]), config).isnan().any()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_groups_of_one_are_refused(shape):
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(shape), NORM)
