"""drafter/divergence.py: each loss and its gradient against the formula in float64, also for very small numbers."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from respec_trainer.drafter.divergence import LossKind, acceptance, divergence

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
    mass = p.sum(-1)
    share = p / mass[:, None]
    kl = mass * (share * (share / q).log()).sum(-1)
    accepted = torch.where(p < q, p, q).sum(-1)
    return {
        "kl": kl,
        "acceptance": 1 - accepted,
        "log_acceptance": -mass * (accepted / mass).log(),
        "mixed": kl + 1.0 * (1 - accepted),
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


def slope(loss, draft):
    """The gradient of a loss [n] in the draft logits."""
    return torch.autograd.grad(loss.sum(), draft)[0]


def test_kl_has_the_gradient_of_the_cross_entropy_with_all_of_p():
    """-sum_v p log q over the draft vocabulary, p not renormalized; in NumPy its gradient is mass * q - p."""
    target, draft = random_logits()
    draft.requires_grad_()
    got = slope(divergence("kl", *log_probs(target, draft)), draft).double().numpy()
    p = np.exp(target.double().numpy())
    p = (p / p.sum(-1, keepdims=True))[:, :30]
    q = np.exp(draft.detach().double().numpy())
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, p.sum(-1, keepdims=True) * q - p, rtol=1e-4, atol=1e-6)
    cross = -(torch.tensor(p) * draft.double().log_softmax(-1)).sum(-1)
    np.testing.assert_allclose(got, slope(cross, draft).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mass", [0.5, 0.01, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_no_more_than_the_mass_that_the_draft_vocabulary_holds(kind, mass):
    """No entry of the gradient exceeds the mass, for each of the two terms of "mixed", however far q is from p~."""
    generator = torch.Generator().manual_seed(0)
    share, draft = (3 * torch.randn(200, 12, generator=generator) for _ in range(2))
    draft.requires_grad_()
    log_p = share.log_softmax(-1) + torch.tensor(mass).log()
    got = slope(divergence(kind, log_p, draft.log_softmax(-1)), draft)
    assert 0 < got.abs().max() <= (2 if kind == "mixed" else 1) * mass * (1 + 1e-4)


def test_with_a_whole_vocabulary_kl_and_log_acceptance_are_the_plain_ones():
    """Nothing changes where a drafter can draft every token: KL(p || q), and minus the logarithm of the acceptance."""
    target, draft = random_logits(vocab=30)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (target, draft))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    accepted = 1 - 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)  # 1 - total variation
    got = [divergence(kind, *log_probs(target, draft)).double() for kind in ("kl", "log_acceptance")]
    torch.testing.assert_close(got[0], kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], -accepted.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "log_acceptance"])
def test_the_best_draft_distribution_is_p_renormalized(kind):
    """Loss and gradient are 0 there, also if the draft vocabulary does not hold all of p; elsewhere there is a loss."""
    target, _ = random_logits()
    draft = target[:, :30].clone().requires_grad_()
    loss = divergence(kind, *log_probs(target, draft))
    torch.testing.assert_close(loss, torch.zeros(20), rtol=0, atol=1e-6)
    assert slope(loss, draft).abs().max() < 1e-6
    assert (divergence(kind, *log_probs(*random_logits())) >= 0).all()


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
