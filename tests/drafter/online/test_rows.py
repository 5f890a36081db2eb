"""drafter/online/rows.py: the responses of a step that are stored, and the divergence of actor from sampler."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.rows import rows_of_step
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
