"""drafter/online/rows.py: the responses of a step that are stored, and the divergence of actor from sampler."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.rows import rows_of_step
from respec_trainer.drafter.online.weighting import response_weights
from tests.support.drafters import target_config
from tests.support.learners import random_samples, score
from tests.support.models import tiny_model

UNIFORM = DrafterConfig(weighting="uniform")


def test_what_is_not_finite_or_empty_is_not_stored():
    model, samples = tiny_model(target_config()), random_samples([(3, 9), (5, 4), (2, 12), (4, 0)])
    inference = score(model, samples[:3])
    inference.captured.rows[1].features[2, 5] = torch.nan
    found = rows_of_step(samples, inference, torch.zeros(2, 2), UNIFORM, LearnerRank(), 7)
    assert [len(row.tokens) for row in found.rows] == [12, 14] and found.refused == 1
    assert {row.step for row in found.rows} == {7} and found.tokens == 9 + 12


def test_each_rank_stores_its_part_of_every_minibatch():
    """The features belong to the responses that the rank scored: 2 of each minibatch of 4, and not 4 in a row."""
    model, samples = tiny_model(target_config()), random_samples([(3, 4 + i) for i in range(8)])
    rewards = torch.arange(8.0).view(2, 4)
    rewards[1, 3] = torch.nan
    for rank, mine in enumerate([[0, 1, 4, 5], [2, 3, 6]]):
        own = [samples[number] for number in [0, 1, 4, 5] if rank == 0] or [samples[number] for number in [2, 3, 6, 7]]
        share = LearnerRank(rank=rank, world_size=2, dp=2, dp_rank=rank, minibatches=2)
        found = rows_of_step(samples, score(model, own), rewards, DrafterConfig(weighting="reward"), share, 1)
        assert sorted(len(row.tokens) for row in found.rows) == [3 + 4 + number for number in mine]
        weights, _ = response_weights(rewards, "reward", "batch")
        stored = {len(row.tokens) - 7: row.weight for row in found.rows}
        assert stored == {number: weights.flatten()[number].item() for number in mine}


def test_rewards_that_are_all_alike_fall_back_to_weights_of_one():
    samples, by_reward = random_samples([(3, 9), (5, 4)]), DrafterConfig(weighting="reward")
    inference = score(tiny_model(target_config()), samples)
    for rewards, fell_back in ((torch.ones(1, 2), True), (torch.arange(2.0).view(1, 2), False)):
        found = rows_of_step(samples, inference, rewards, by_reward, LearnerRank(), 1)
        assert found.fell_back == fell_back and ([row.weight for row in found.rows] == [1.0, 1.0]) == fell_back


def test_drift_is_the_divergence_from_the_sampler():
    model, samples = tiny_model(target_config()), random_samples([(3, 9), (5, 4)])
    inference, expected = score(model, samples), 0.0
    for number, sample in enumerate(samples):
        start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        actor = inference.logprobs[number, start:end].double()
        rho = actor.exp() / torch.tensor(sample.sampler_logprobs).double().exp()
        expected += (rho * rho.log() - rho + 1).sum().item()
    found = rows_of_step(samples, inference, torch.zeros(1, 2), UNIFORM, LearnerRank(), 1)
    assert (found.drift, found.tokens) == (pytest.approx(expected), 13)


def test_a_rank_stores_the_responses_of_its_own_share():
    """Rank 3 of tp 2 x dp 2 scored the second half of the samples, and captured the second row of it."""
    model, samples = tiny_model(target_config()), random_samples([(3, 9), (5, 4), (2, 12), (4, 7)])
    inference = score(model, samples[2:], rows=[1])
    rewards = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    rank = LearnerRank(rank=3, world_size=4, dp=2, dp_rank=1)
    found = rows_of_step(samples, inference, rewards, DrafterConfig(weighting="reward"), rank, 1)
    (row,) = found.rows
    assert row.tokens.tolist() == samples[3].prompt_ids + samples[3].response_ids and row.prompt == 4
    assert row.weight == pytest.approx(3.0 / 2.0) and row.passes == samples[3].verify_count == 5
    assert row.snapshot.output_rows is inference.captured.output_rows and found.tokens == 7
    rewards[1, 1] = torch.nan
    assert not rows_of_step(samples, inference, rewards, UNIFORM, rank, 1).rows


@pytest.mark.parametrize("name", ["features", "hidden", "logsumexp"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_each_tensor_is_checked(name, bad):
    samples = random_samples([(3, 9), (5, 4)])
    inference = score(tiny_model(target_config()), samples)
    getattr(inference.captured.rows[0], name).view(-1)[3] = bad
    found = rows_of_step(samples, inference, torch.zeros(1, 2), UNIFORM, LearnerRank(), 1)
    assert found.refused == 1 and [row.response for row in found.rows] == [4] and found.tokens == 4


def test_without_captured_rows_there_is_nothing_to_store():
    samples = random_samples([(3, 9), (5, 4)])
    inference = score(tiny_model(target_config()), samples)
    inference.captured = None
    assert rows_of_step(samples, inference, torch.zeros(1, 2), UNIFORM, LearnerRank(), 1).rows == []
