from __future__ import annotations

import math

import pytest
import torch

from respec_trainer.actor.objective import finish_metrics, k3, merge_sums, policy_loss, token_weights
from respec_trainer.config import ObjectiveConfig

MASK = torch.tensor([[False, True, True, True], [False, False, True, False]])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[0.0, *values]])


def loss_of(new, old, sampler, advantage: float, **settings) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and metrics of one response, its log-probs given token by token."""
    new, old, sampler = row(*new).requires_grad_(), row(*old), row(*sampler)
    mask = torch.ones_like(new, dtype=torch.bool)
    mask[0, 0] = False
    weights = token_weights(mask, "token", tokens=float(mask.sum()), sequences=1.0)
    origins, config = torch.zeros_like(mask, dtype=torch.int8), ObjectiveConfig(**settings)
    loss, sums = policy_loss(
        new, torch.zeros_like(new), old, sampler, torch.tensor([advantage]), mask, weights, origins, config
    )
    loss.backward()
    return new.grad[0, 1:], finish_metrics(sums) | {"loss": loss.item()}


def test_on_policy_gradient_is_the_advantage():
    gradient, metrics = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], advantage=3.0)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, -1.5]))  # -A / tokens
    assert metrics["loss"] == pytest.approx(-3.0)
    assert metrics["policy/kl"] == metrics["mismatch/kl"] == metrics["policy/clip_fraction"] == 0.0


def test_a_ratio_past_the_clip_gets_no_gradient_where_it_helps_only():
    up, down = math.log(1.5), math.log(0.5)
    gradient, metrics = loss_of([up, down], [0.0, 0.0], [0.0, 0.0], advantage=1.0)
    # Above the clip with a positive advantage: cut off. Below it: the way back stays open.
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.25]))
    assert metrics["loss"] == pytest.approx(-(1.2 + 0.5) / 2)
    assert metrics["policy/clip_fraction"] == 0.5
    gradient, metrics = loss_of([up, down], [0.0, 0.0], [0.0, 0.0], advantage=-1.0)
    torch.testing.assert_close(gradient, torch.tensor([0.75, 0.0]))
    assert metrics["loss"] == pytest.approx((1.5 + 0.8) / 2)


def test_the_clip_may_be_asymmetric():
    gradient, _ = loss_of([math.log(1.25)], [0.0], [0.0], advantage=1.0, clip_high=0.28)
    assert gradient[0] == pytest.approx(-1.25)
    gradient, _ = loss_of([math.log(1.3)], [0.0], [0.0], advantage=1.0, clip_high=0.28)
    assert gradient[0] == 0.0


def test_truncated_importance_sampling_weighs_tokens_by_the_mismatch():
    sampler = [-1.0 - math.log(1.5), -1.0 - math.log(4.0)]
    gradient, metrics = loss_of([-1.0, -1.0], [-1.0, -1.0], sampler, advantage=1.0, tis_clip=2.0)
    torch.testing.assert_close(gradient, torch.tensor([-0.75, -1.0]))  # 1.5 kept, 4 truncated to 2
    assert metrics["mismatch/clipped"] == 0.5
    assert metrics["mismatch/ratio_max"] == pytest.approx(4.0)
    gradient, metrics = loss_of([-1.0, -1.0], [-1.0, -1.0], sampler, advantage=1.0, correction="none")
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -0.5]))
    assert metrics["mismatch/clipped"] == 0.0
    assert metrics["mismatch/ratio_max"] == pytest.approx(4.0)


def test_the_correction_has_an_expectation_free_of_the_mismatch():
    # Summed over the sampler's law, w * A is the actor's expectation of A wherever nothing is truncated.
    actor, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    value = torch.tensor([1.0, -2.0, 1.5])
    gains = [
        -loss_of([a.log().item()], [a.log().item()], [s.log().item()], v.item())[1]["loss"]
        for a, s, v in zip(actor, sampler, value, strict=True)
    ]
    assert (sampler * torch.tensor(gains)).sum().item() == pytest.approx((actor * value).sum().item())


def test_k3_is_never_negative_and_its_mean_is_the_divergence():
    q, p = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    estimates = k3(p.log() - q.log())
    assert (estimates >= 0).all()
    torch.testing.assert_close((q * estimates).sum(), (q * (q.log() - p.log())).sum())


def test_token_weights_count_every_token_alike():
    weights = token_weights(MASK, "token", tokens=4.0, sequences=2.0)
    assert torch.equal(weights, MASK / 4)


def test_sequence_weights_count_every_response_alike():
    weights = token_weights(MASK, "sequence", tokens=4.0, sequences=2.0)
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.5, 0.5]))
    assert weights[1, 2] == 0.5


def test_what_lies_outside_the_mask_is_never_looked_at():
    hostile = torch.where(MASK, -1.0, float("nan"))
    weights = token_weights(MASK, "token", 4.0, 2.0)
    fine = torch.where(MASK, -1.0, 0.0)
    arguments = (torch.tensor([1.0, 2.0]), MASK, weights, torch.zeros_like(MASK), ObjectiveConfig())
    hostile_loss, hostile_sums = policy_loss(hostile, hostile, hostile, hostile, *arguments)
    loss, sums = policy_loss(fine, fine, fine, fine, *arguments)
    assert hostile_loss == loss
    assert hostile_sums == sums


@pytest.mark.parametrize("correction", ["none", "tis", "token_mask", "sequence_mask"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_add_up_to_the_whole(aggregation, correction):
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy, old, sampler = -3 * torch.rand(4, 5, 9, generator=generator)
    sampler[2] -= 2.0  # a response that sequence_mask takes out
    origins = torch.randint(0, 2, (5, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 6, 1, 0])[:, None]
    advantages, config = torch.randn(5, generator=generator), ObjectiveConfig(correction=correction)

    def run(rows: slice):
        weights = token_weights(mask[rows], aggregation, tokens=20.0, sequences=4.0)
        tensors = (logprobs, entropy, old, sampler, advantages, mask)
        return policy_loss(*(t[rows] for t in tensors), weights, origins[rows], config)

    whole, sums = run(slice(None))
    parts = [run(slice(0, 1)), run(slice(1, 4)), run(slice(4, 5))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    metrics = finish_metrics(sums)
    assert finish_metrics(merge_sums([part[1] for part in parts])) == pytest.approx(metrics, abs=1e-6)
    assert (metrics["mismatch/clipped"] > 0) == (correction != "none")


def test_losses_are_means_over_updates_and_all_else_over_the_tokens_of_a_step():
    sums = {"tokens": 3.0, "policy/loss": 1.0, "policy/kl": 6.0, "policy/grad_norm": 8.0, "mismatch/ratio_max": 2.0}
    sums |= {"mismatch/ratio_min": 0.5, "tokens_plain": 2.0, "mismatch/kl_plain": 1.0}
    sums |= {"tokens_bonus": 0.0, "mismatch/kl_bonus": 0.0}
    more = {"tokens": 1.0, "policy/loss": 2.0, "policy/kl": 2.0, "policy/grad_norm": 2.0, "mismatch/ratio_max": 4.0}
    more |= {"mismatch/ratio_min": 0.75, "tokens_plain": 0.0, "mismatch/kl_plain": 0.0}
    more |= {"tokens_bonus": 0.0, "mismatch/kl_bonus": 0.0}
    parts = [{name: torch.tensor(value).double() for name, value in part.items()} for part in (sums, more)]
    assert finish_metrics(merge_sums(parts), updates=2) == {
        "policy/loss": 1.5,
        "policy/kl": 2.0,
        "policy/grad_norm": 5.0,
        "mismatch/ratio_max": 4.0,
        "mismatch/ratio_min": 0.5,
        "mismatch/kl_plain": 0.5,  # over both minibatches' two plain tokens; there was no bonus token
    }


def test_a_minibatch_without_tokens_has_no_loss():
    blank = torch.zeros(1, 3)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    weights = token_weights(mask, "sequence", 1.0, 1.0)
    loss, sums = policy_loss(blank, blank, blank, blank, torch.ones(1), mask, weights, mask, ObjectiveConfig())
    assert loss == 0.0
    metrics = finish_metrics(sums)
    assert metrics["policy/kl"] == 0.0
    assert not {"mismatch/ratio_max", "mismatch/ratio_min", "mismatch/kl_plain"} & metrics.keys()
