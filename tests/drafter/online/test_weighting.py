"""drafter/online/weighting.py: the weights of responses, none of which is zero."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.drafter.online.weighting import CEILING, FLOOR, response_weights

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_uniform_weights_do_not_depend_on_rewards():
    weights, fell_back = response_weights(torch.full((2, 3), torch.nan), "uniform")
    assert torch.equal(weights, torch.ones(2, 3)) and not fell_back


def test_reward_over_the_batch():
    weights, fell_back = response_weights(REWARDS, "reward")
    assert not fell_back and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.where(REWARDS > 0, 1 / REWARDS.mean(), FLOOR))


def test_reward_over_the_group_leaves_equal_groups_at_one():
    weights, _ = response_weights(REWARDS, "reward", "group")
    torch.testing.assert_close(weights, torch.tensor([[4.0, FLOOR, FLOOR, FLOOR], [1.0, 1.0, 1.0, 1.0]]))


def test_the_scale_and_the_origin_of_rewards_do_not_matter():
    rewards = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for weighting in ("reward", "advantage"):
        one, other = (response_weights(r, weighting)[0] for r in (rewards, 300 * rewards - 7))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # rewards of 1000 carry float32's rounding


def test_advantage_is_one_plus_the_standard_score():
    weights, _ = response_weights(REWARDS, "advantage")
    score = (REWARDS[0] - 0.25) / REWARDS[0].std()
    torch.testing.assert_close(weights[0], (1 + score).clamp(FLOOR, CEILING))
    assert torch.equal(weights[1], torch.ones(4))


@pytest.mark.parametrize("weighting", ["reward", "advantage"])
def test_one_success_among_many_is_bounded(weighting):
    rewards = torch.zeros(1, 64)
    rewards[0, 3] = 1
    weights, _ = response_weights(rewards, weighting)
    assert weights.max() == weights[0, 3] == CEILING and weights.min() >= FLOOR


@pytest.mark.parametrize("weighting", ["reward", "advantage"])
@pytest.mark.parametrize("bad", [[[0.5, 0.5]], [[1.0, -torch.inf]], [[torch.inf, 0.0]]])
def test_rewards_without_differences_have_equal_weights(weighting, bad):
    weights, fell_back = response_weights(torch.tensor(bad), weighting)
    assert fell_back and torch.equal(weights, torch.ones(1, 2))


@pytest.mark.parametrize(("weighting", "scope"), [("reward", "batch"), ("reward", "group"), ("advantage", "batch")])
def test_skipped_samples_leave_the_weights_of_the_others_as_without_them(weighting, scope):
    scored = torch.tensor([[3.0, 1.0, 0.5], [2.0, 0.25, 0.0]])
    padded = torch.full((3, 5), torch.nan)  # the last group is skipped whole
    padded[:2, torch.tensor([0, 2, 3])] = scored
    weights, fell_back = response_weights(padded, weighting, scope)
    wanted, _ = response_weights(scored, weighting, scope)
    assert not fell_back and torch.equal(weights[:2, torch.tensor([0, 2, 3])], wanted)
    assert weights.isfinite().all()


def test_a_group_of_which_one_sample_was_scored_weighs_one():
    weights, _ = response_weights(torch.tensor([[1.0, torch.nan], [1.0, 0.0]]), "advantage")
    assert weights[0, 0] == 1.0


@pytest.mark.parametrize("weighting", ["reward", "advantage"])
def test_equal_scored_samples_have_equal_weights(weighting):
    for rewards in ([[1.0, torch.nan], [1.0, 1.0]], [[torch.nan, torch.nan]]):
        weights, fell_back = response_weights(torch.tensor(rewards), weighting)
        assert fell_back and torch.equal(weights, torch.ones(weights.shape))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="unknown weighting 'best'"):
        response_weights(REWARDS, "best")
