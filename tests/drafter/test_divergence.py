"""drafter/divergence.py: each loss and its gradient against the formula in float64, also for very small numbers."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from respec_trainer.drafter.divergence import MIX, LossKind, acceptance, divergence

KINDS = typing.get_args(LossKind)


def random_logits(seed: int = 0, rows: int = 20, vocab: int = 50, drafted: int = 30):
    """Logits of the target, the first `drafted` tokens being the draft vocabulary, and of the drafter."""
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(rows, vocab, generator=generator)
    return target, target[:, :drafted] + torch.randn(rows, drafted, generator=generator)


def log_probs(target, draft):
    return (target.log_softmax(-1)[:, : draft.shape[1]], draft.log_softmax(-1))


def formula(kind, target, draft):
    """The loss computed from probabilities, in the dtype of the logits."""
    p, q = target.softmax(-1)[:, : draft.shape[1]], draft.softmax(-1)
    share = p / p.sum(-1, keepdim=True)
    kl = (share * (share / q).log()).sum(-1)
    accepted = torch.where(p < q, p, q).sum(-1)
    return {
        "kl": kl,
        "acceptance": 1 - accepted,
        "log_acceptance": -accepted.log(),
        "mixed": kl + MIX * (1 - accepted),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_formula(kind):
    target, draft = random_logits()
    draft.requires_grad_()
    got = divergence(kind, *log_probs(target, draft))
    exact = draft.detach().double().requires_grad_()
    expected = formula(kind, target.double(), exact)
    # float32 against float64: sums of 30 terms of order one.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(got.sum(), draft)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-4, atol=1e-6)


def test_acceptance_is_what_rejection_sampling_accepts():
    """Draw x from q, accept with min(1, p/q), 200,000 times in NumPy: the share's standard error is at most 0.0011."""
    target, draft = random_logits(rows=1)
    p, q = (log.exp().double()[0].numpy() for log in log_probs(target, draft))
    generator = np.random.default_rng(0)
    drawn = generator.choice(len(q), 200_000, p=q / q.sum())
    accepted = (generator.random(len(drawn)) < p[drawn] / q[drawn]).mean()
    assert acceptance(*log_probs(target, draft)).item() == pytest.approx(accepted, abs=5 * 0.0011)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_draft_distribution_is_the_target_s(kind):
    """If all of p is inside the draft vocabulary, the smallest loss is 0, at q = p."""
    target, _ = random_logits(vocab=30)
    same = divergence(kind, *log_probs(target, target))
    torch.testing.assert_close(same, torch.zeros(20), rtol=0, atol=1e-6)  # a sum of 30 rounded probabilities
    assert (divergence(kind, *log_probs(*random_logits(vocab=30))) > 1e-3).all()


def test_what_lies_outside_the_draft_vocabulary_can_not_be_accepted():
    target, _ = random_logits()
    inside = target[:, :30]
    p = target.softmax(-1)[:, :30].sum(-1)
    torch.testing.assert_close(divergence("acceptance", *log_probs(target, inside)), 1 - p)


def test_logarithms_of_acceptances_too_small_for_float32_keep_a_gradient():
    target = torch.tensor([[0.0, -400.0]])
    draft = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    loss = divergence("log_acceptance", *log_probs(target, draft))
    assert loss.item() == pytest.approx(300.0)
    (slope,) = torch.autograd.grad(loss.sum(), draft)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 1.0]]))  # only q(0) matters, and it rises
    assert divergence("acceptance", *log_probs(target, draft)).item() == 1.0


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="'l2' is none of kl"):
        divergence("l2", *log_probs(*random_logits()))
