from __future__ import annotations

import pytest
import torch

from respec_trainer.actor.advantages import group_advantages

REWARDS = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 6.0]])


def test_group_mean_subtracts_each_groups_mean():
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-1.0, -1.0, -1.0, 3.0]])
    torch.testing.assert_close(group_advantages(REWARDS, "group_mean"), expected)


def test_group_norm_makes_every_group_count_alike():
    advantages = group_advantages(REWARDS, "group_norm")
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2))
    torch.testing.assert_close(advantages.std(1), torch.ones(2))
    assert advantages[1, 3] == pytest.approx(1.5)  # 3 / std of (-1, -1, -1, 3) = 3 / 2


@pytest.mark.parametrize("kind", ["group_norm", "group_mean"])
def test_equal_rewards_teach_nothing_exactly(kind):
    # 0.1 is no binary fraction: the mean of seven is not 0.1, and dividing by the std would make it large.
    rewards = torch.full((2, 7), 0.1)
    assert torch.equal(group_advantages(rewards, kind), torch.zeros(2, 7))


def test_a_reward_that_is_not_a_number_is_not_hidden():
    rewards = torch.tensor([[0.0, float("nan"), 1.0]])
    assert group_advantages(rewards, "group_norm").isnan().any()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_groups_of_one_are_refused(shape):
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(shape), "group_norm")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind"):
        group_advantages(REWARDS, "value_model")
