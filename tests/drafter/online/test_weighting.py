"""drafter/online/weighting.py: the weights of responses, none of which is zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.drafter.online.weighting import response_weights

FLOOR, CEILING = 0.1, 4.0  # as docs/learner.md says
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
@pytest.mark.parametrize(
    "bad",
    [
        [[0.5, 0.5]],
        [[1.0, -torch.inf]],
        [[torch.inf, 0.0]],
        [[torch.inf, -torch.inf]],
        [[torch.inf, torch.inf]],
        [[0.0, 0.0]],
    ],
)
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


def effective_size(weights: torch.Tensor) -> float:
    return (weights.sum() ** 2 / weights.square().sum()).item()


@st.composite
def rewards_of_a_step(draw):
    """Rewards [prompts, n]: with skipped ones, equal ones, few successes, and heavy tails of either sign."""
    prompts, group = draw(st.integers(1, 4)), draw(st.integers(2, 32))
    kinds = [
        st.floats(-1e3, 1e3, width=32),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([0.0] * 31 + [1.0]),
        st.sampled_from([0.5, 0.5 + 2**-24, 0.5 - 2**-25]),
        st.floats(-(2.0**99), 2.0**99, width=32),
        st.just(-2.5),
    ]
    value = draw(st.sampled_from(kinds))
    value = value | st.just(torch.nan) if draw(st.booleans()) else value
    rows = draw(st.lists(st.lists(value, min_size=group, max_size=group), min_size=prompts, max_size=prompts))
    return torch.tensor(rows)


@settings(max_examples=300, deadline=None)
@given(rewards_of_a_step(), st.sampled_from([("reward", "batch"), ("reward", "group"), ("advantage", "batch")]))
def test_no_rewards_leave_less_than_a_tenth_of_the_responses(rewards, how):
    """The bound that the module and docs/learner.md state: 4 * 0.1 * 4 / 4.1^2 = 9.5 % of those that were scored."""
    weights, fell_back = response_weights(rewards, *how)
    known = weights[~rewards.isnan()]
    assert known.isfinite().all() and ((known >= FLOOR - 1e-6) & (known <= CEILING + 1e-6)).all()
    if len(known):
        assert effective_size(known) >= 0.0951 * len(known)
    assert not fell_back or (weights == 1).all()


@pytest.mark.parametrize(("count", "wanted"), [(32, 7.1**2 / 16.31), (8, 4.7**2 / 16.07)])
def test_one_success_keeps_the_effective_size_that_is_stated(count, wanted):
    """4 and n - 1 times 0.1: 3.1 of 32, and more than half of the weight in one."""
    rewards = torch.zeros(1, count)
    rewards[0, 2] = 1.0
    weights, _ = response_weights(rewards, "reward")
    assert effective_size(weights) == pytest.approx(wanted, rel=1e-5)
    assert weights.max() / weights.sum() > 0.5
    assert count == 8 or effective_size(weights) == pytest.approx(3.1, abs=0.05)


@pytest.mark.parametrize("weighting", ["reward", "advantage"])
@pytest.mark.parametrize("level", [0.3, -50.0, 1e-4])
def test_rewards_that_differ_by_rounding_have_equal_weights(weighting, level):
    rounded = torch.tensor([[level] * 3 + [level * (1 + 2e-7)]])
    weights, fell_back = response_weights(rounded, weighting)
    assert rounded.unique().numel() == 2 and fell_back and (weights == 1).all()
    weights, fell_back = response_weights(torch.tensor([[level] * 3 + [level * (1 + 1e-4)]]), weighting)
    assert not fell_back and weights.max() > 1.3 and weights.min() < 0.6
    # One group of two that are alike up to rounding, one that is not.
    weights, fell_back = response_weights(
        torch.cat([rounded, torch.tensor([[0.0, 0.0, 1.0, 2.0]])]), weighting, "group"
    )
    assert not fell_back and (weights[0] == 1).all() and (weights[1] != 1).all()


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="unknown weighting 'best'"):
        response_weights(REWARDS, "best")
