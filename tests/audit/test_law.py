"""audit/law.py on laws small enough to write down."""

from __future__ import annotations

import math

import pytest
import torch

from respec_trainer.audit.law import certain, laws, shaped
from respec_trainer.rollout.sample import SamplingParams

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


@pytest.mark.parametrize(
    ("params", "law"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
def test_sampling_parameters_shape_the_law(params, law):
    assert torch.allclose(shaped(LOGITS, SamplingParams(1, **params))[0], torch.tensor(law, dtype=torch.float64))


@pytest.mark.parametrize(
    ("law", "params", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], {}, "1111"),
        ([0.5, 0.3, 0.15, 0.05], {"temperature": 0.0}, "1111"),
        ([0.9, 0.06, 0.03, 0.01], {"top_k": 1}, "1000"),  # the second is 15 times rarer than the first
        ([0.5, 0.3, 0.15, 0.05], {"top_k": 1}, "0000"),  # the first two may change places
        ([0.5, 0.3, 0.15, 0.05], {"top_k": 2}, "1000"),  # the second three may: 0.15 * 3 > 0.3
        ([0.5, 0.3, 0.15, 0.05], {"top_k": 3}, "1110"),
        ([0.5, 0.3, 0.15, 0.05], {"temperature": 0.5, "top_k": 2}, "1100"),  # 0.15 is then 4 times rarer than 0.3
        # Before the second may be the first and the third, 0.65: with odds three times as high, 0.85.
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.86}, "1100"),
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.84}, "1000"),
        # Before the first may be the second, 0.3: 0.5625.
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.57}, "1000"),
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.55}, "0000"),
        # Of the three that top_k keeps, the first and third have the share 0.684: 0.867.
        ([0.5, 0.3, 0.15, 0.05], {"top_k": 3, "top_p": 0.87}, "1100"),
        ([0.5, 0.3, 0.15, 0.05], {"top_k": 3, "top_p": 0.86}, "1000"),
    ],
)
def test_tokens_that_are_certain_to_be_kept(law, params, kept):
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([law]).log()[:, order]
    found = certain(logits, SamplingParams(1, **params))[0]
    assert "".join(str(int(found[int((order == rank).nonzero())])) for rank in range(4)) == kept


def test_engines_that_agree_better_are_certain_of_more():
    """Before the third token is a share of 0.8 / 0.95, or odds of 5.33; top_p allows odds of 6.69, 1.255 times that."""
    params = SamplingParams(1, top_k=3, top_p=0.87)
    assert certain(LOGITS, params, odds=1.25).tolist() == [[True, True, True, False]]
    assert certain(LOGITS, params, odds=1.26).tolist() == [[True, True, False, False]]
    assert torch.equal(laws(LOGITS, params, odds=1.25).certain, certain(LOGITS, params, odds=1.25))


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"top_p": 0.5}, {"top_k": 5}, {"top_k": 6, "top_p": 0.8}])
def test_certain_tokens_are_kept_by_every_engine_that_agrees_about_the_odds(params):
    """Each logit changes by up to log(3) / 2, so odds of two sets of tokens change by a factor of 3 at most."""
    sampling, generator = SamplingParams(1, **params), torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(2000, 15, generator=generator)
    for _ in range(10):
        sign = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        other = shaped(logits + 0.4999 * math.log(3) * sign, sampling)
        assert (other > 0)[certain(logits, sampling)].all()
    some = laws(logits, sampling)
    assert torch.equal(some.certain, certain(logits, sampling)) and torch.equal(some.probs, shaped(logits, sampling))
    assert some.probs[some.certain].sum() > 0.35 * len(logits), "too little is certain to be tested"
