from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import finish, merge
from respec_trainer.objective.registry import setup_objective

MASK = torch.tensor([[False, True, True, True], [False, False, True, False]])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[0.0, *values]])


def loss_of(new, old, sampler, advantage: float, **settings) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient and metrics of one response, its log-probs given token by token; the loss is among the metrics."""
    new, old, sampler = row(*new).requires_grad_(), row(*old), row(*sampler)
    mask = torch.ones_like(new, dtype=torch.bool)
    mask[0, 0] = False
    objective = setup_objective(ObjectiveConfig(**settings))
    weights = objective.token_weights(mask, tokens=float(mask.sum()), sequences=1.0)
    origins = torch.zeros_like(mask, dtype=torch.int8)
    inputs = LossInputs(new, torch.zeros_like(new), old, sampler, torch.tensor([advantage]), mask, weights, origins)
    loss, metrics = objective.loss(inputs)
    loss.backward()
    return new.grad[0, 1:], finish(metrics) | {"loss": loss.item()}


def test_on_policy_gradient_is_the_advantage():
    gradient, metrics = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], advantage=3.0)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, -1.5]))  # -A / tokens
    assert metrics["loss"] == pytest.approx(-3.0)
    assert metrics["policy/kl"] == metrics["mismatch/kl"] == metrics["policy/clip_fraction"] == 0.0


def test_a_clipped_ratio_has_no_gradient_away_from_one_only():
    up, down = math.log(1.5), math.log(0.5)
    gradient, metrics = loss_of([up, down], [0.0, 0.0], [0.0, 0.0], advantage=1.0)
    # Positive advantage: above the clip there is no gradient; below it there is one, which moves the ratio back up.
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.25]))
    assert metrics["loss"] == pytest.approx(-(1.2 + 0.5) / 2)
    assert metrics["policy/clip_fraction"] == 0.5
    gradient, metrics = loss_of([up, down], [0.0, 0.0], [0.0, 0.0], advantage=-1.0)
    torch.testing.assert_close(gradient, torch.tensor([0.75, 0.0]))
    assert metrics["loss"] == pytest.approx((1.5 + 0.8) / 2)


def test_the_upper_clip_may_be_wider_than_the_lower():
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    gradient, _ = loss_of([math.log(1.25)], [0.0], [0.0], advantage=1.0, **clips)
    assert gradient[0] == pytest.approx(-1.25)
    gradient, metrics = loss_of([math.log(1.3)], [0.0], [0.0], advantage=1.0, **clips)
    assert gradient[0] == 0.0
    assert metrics["loss"] == pytest.approx(-1.28)


def test_the_lower_clip_is_its_own_where_the_upper_is_wider():
    clips = {"clip_low": 0.1, "clip_high": 0.4}
    # 0.7 lies between 1 - clip_high and 1 - clip_low: pushed down far enough already.
    gradient, metrics = loss_of([math.log(0.7)], [0.0], [0.0], advantage=-1.0, **clips)
    assert gradient[0] == 0.0
    assert metrics["loss"] == pytest.approx(0.9)
    assert metrics["policy/clip_fraction"] == 1.0
    gradient, metrics = loss_of([math.log(0.95)], [0.0], [0.0], advantage=-1.0, **clips)
    assert gradient[0] == pytest.approx(0.95)
    assert metrics["policy/clip_fraction"] == 0.0


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
    # Over the sampler's distribution, w * A has the actor's expectation of A wherever nothing is truncated.
    actor, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    value = torch.tensor([1.0, -2.0, 1.5])
    gains = [
        -loss_of([a.log().item()], [a.log().item()], [s.log().item()], v.item())[1]["loss"]
        for a, s, v in zip(actor, sampler, value, strict=True)
    ]
    assert (sampler * torch.tensor(gains)).sum().item() == pytest.approx((actor * value).sum().item())


def make_inputs(rows: slice = slice(None), config: ObjectiveConfig | None = None, **changes) -> LossInputs:
    """Five off-policy responses of 20 tokens: one is empty, and one has a low probability under the sampler."""
    generator = torch.Generator().manual_seed(0)
    logprobs, entropies, old, sampler = -3 * torch.rand(4, 5, 9, generator=generator)
    sampler[2] -= 2.0  # a response that sequence_mask removes
    mask = torch.arange(9) < torch.tensor([9, 4, 6, 1, 0])[:, None]
    origins = torch.randint(0, 2, (5, 9), generator=generator).to(torch.int8)
    tensors = {"logprobs": logprobs, "entropies": -entropies, "old": old, "sampler": sampler, "mask": mask}
    tensors |= {"advantages": torch.randn(5, generator=generator), "origins": origins}
    tensors = {name: tensor[rows] for name, tensor in (tensors | changes).items()}
    objective = setup_objective(config or ObjectiveConfig())
    return LossInputs(**tensors, weights=objective.token_weights(tensors["mask"], tokens=20.0, sequences=4.0))


def test_values_outside_the_mask_do_not_matter():
    fine = make_inputs()
    objective = setup_objective(ObjectiveConfig())
    names = ("logprobs", "entropies", "old", "sampler")
    hostile = {name: torch.where(fine.mask, getattr(fine, name), float("nan")) for name in names}
    hostile["logprobs"].requires_grad_()
    loss, metrics = objective.loss(make_inputs(**hostile))
    expected_loss, expected = objective.loss(fine)
    assert loss == expected_loss
    assert finish(metrics) == finish(expected)
    loss.backward()
    gradient = hostile["logprobs"].grad
    assert torch.equal(gradient[~fine.mask], torch.zeros(25)) and gradient.isfinite().all()


def test_divergence_and_entropy_of_an_off_policy_batch_are_the_formulas():
    inputs = make_inputs()
    _, metrics = setup_objective(ObjectiveConfig()).loss(inputs)
    mask = inputs.mask.numpy()
    new, old, entropies = (
        getattr(inputs, name).numpy().astype(np.float64)[mask] for name in ("logprobs", "old", "entropies")
    )
    numbers = finish(metrics)
    # KL(old || now) of tokens that the old policy drew; the other direction is another number.
    divergence, other = ((np.exp(d) - 1 - d).mean() for d in (new - old, old - new))
    assert numbers["policy/kl"] == pytest.approx(divergence, rel=1e-5)
    assert abs(divergence / other - 1) > 0.05, "the test must distinguish the two directions"
    assert numbers["policy/entropy"] == pytest.approx(entropies.mean(), rel=1e-6)


@pytest.mark.parametrize("correction", ["none", "tis", "token_mask", "sequence_mask"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_add_up_to_the_whole(aggregation, correction):
    config = ObjectiveConfig(correction=correction, aggregation=aggregation)
    objective = setup_objective(config)
    whole, metrics = objective.loss(make_inputs(slice(None), config))
    parts = [objective.loss(make_inputs(slice(*rows), config)) for rows in ((0, 1), (1, 4), (4, 5))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    numbers = finish(metrics)
    assert finish(merge([part for _, part in parts])) == pytest.approx(numbers, abs=1e-6)
    assert (numbers["mismatch/clipped"] > 0) == (correction != "none")


def test_a_skipped_response_counts_for_nothing():
    mask = make_inputs().mask.clone()
    mask[1] = False
    loss, metrics = setup_objective(ObjectiveConfig()).loss(make_inputs(mask=mask))
    kept = [0, 2, 3, 4]
    expected_loss, expected = setup_objective(ObjectiveConfig()).loss(make_inputs(kept))
    torch.testing.assert_close(loss, expected_loss)
    assert finish(metrics) == pytest.approx(finish(expected), rel=1e-6)


def test_a_minibatch_without_tokens_has_no_loss():
    loss, metrics = setup_objective(ObjectiveConfig()).loss(make_inputs(slice(4, 5)))
    assert loss == 0.0
    numbers = finish(metrics)
    assert numbers["policy/kl"] == 0.0
    assert not {"mismatch/ratio_max", "mismatch/ratio_min", "mismatch/kl_plain"} & numbers.keys()
