"""objective/mismatch.py and the corrected loss, against the formulas written out with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import finish
from respec_trainer.objective.mismatch import correction_weights, mismatch_metrics
from respec_trainer.objective.registry import setup_objective

CORRECTIONS = ("none", "tis", "token_mask", "sequence_mask")
MASK = np.arange(40) < np.array([[40], [17], [1], [0], [33], [25]])


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    """Six responses in float32, some of them drawn entirely from another distribution than the actor's."""
    generator = np.random.default_rng(seed)
    shift = np.array([0.0, 1.0, 0.0, 0.0, -1.0, 0.3])[:, None]
    old = -generator.exponential(2.0, MASK.shape)
    inputs = {
        "logprobs": old + generator.normal(0, 0.3, MASK.shape),
        "old": old,
        "sampler": old - shift + generator.normal(0, 0.5, MASK.shape),
        "advantages": generator.normal(0, 1, len(MASK)),
        "origins": generator.integers(0, 3, MASK.shape),
    }
    return {name: values.astype(np.int8 if name == "origins" else np.float32) for name, values in inputs.items()}


def reference_weights(log_ratio: np.ndarray, config: ObjectiveConfig) -> np.ndarray:
    """Compute the factor of each token in a loop over responses and tokens."""
    weights = np.ones(MASK.shape)
    for row, mask in enumerate(MASK):
        ratios = np.exp(log_ratio[row][mask])
        if config.correction == "tis":
            weights[row, mask] = [min(ratio, config.tis_clip) for ratio in ratios]
        elif config.correction == "token_mask":
            weights[row, mask] = [ratio if config.mask_low <= ratio <= config.mask_high else 0 for ratio in ratios]
        elif config.correction == "sequence_mask" and mask.any():
            geometric = np.prod(ratios) ** (1 / mask.sum())
            weights[row, mask] = float(config.mask_low <= geometric <= config.mask_high)
    return weights


def run(inputs: dict[str, np.ndarray], config: ObjectiveConfig) -> tuple[float, dict[str, float]]:
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    mask, objective = torch.from_numpy(MASK), setup_objective(config)
    weights = objective.token_weights(mask, float(MASK.sum()), float(MASK.any(1).sum()))
    entropies = torch.zeros_like(tensors["logprobs"])
    loss, metrics = objective.loss(LossInputs(**tensors, entropies=entropies, mask=mask, weights=weights))
    return loss.item(), finish(metrics)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.8, 1.3)])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_corrected_loss_is_the_formula(correction, bounds, seed):
    config = ObjectiveConfig(correction=correction, mask_low=bounds[0], mask_high=bounds[1], tis_clip=bounds[1])
    inputs = random_inputs(seed)
    new, old, sampler = (inputs[name].astype(np.float64) for name in ("logprobs", "old", "sampler"))
    weights, advantages = reference_weights(old - sampler, config), inputs["advantages"].astype(np.float64)[:, None]
    ratio = np.exp(new - old)
    gains = weights * np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    loss, metrics = run(inputs, config)
    # Over all response tokens, the masked ones too.
    assert loss == pytest.approx(-gains[MASK].sum() / MASK.sum(), rel=1e-5, abs=1e-6)
    rho = np.exp(old - sampler)
    unchanged = {"none": np.ones_like(rho), "sequence_mask": np.ones_like(rho)}.get(correction, rho)
    assert metrics["mismatch/clipped"] == pytest.approx((weights != unchanged)[MASK].mean())
    assert correction == "none" or 0 < metrics["mismatch/clipped"] < 1


@pytest.mark.parametrize("seed", range(4))
def test_the_metrics_are_the_formulas(seed):
    inputs = random_inputs(seed)
    log_ratio = (inputs["old"] - inputs["sampler"]).astype(np.float64)[MASK]
    ratio, origins = np.exp(log_ratio), inputs["origins"][MASK]
    divergence = ratio - 1 - log_ratio
    _, metrics = run(inputs, ObjectiveConfig())
    assert metrics["mismatch/kl"] == pytest.approx(divergence.mean())
    assert metrics["mismatch/ratio_max"] == pytest.approx(ratio.max())
    assert metrics["mismatch/ratio_min"] == pytest.approx(ratio.min())
    for threshold in (1.1, 1.5, 2):
        share = (np.maximum(ratio, 1 / ratio) > threshold).mean()
        assert metrics[f"mismatch/above_{threshold}"] == pytest.approx(share)
    for origin, value in (("plain", 0), ("accepted", 1), ("bonus", 2)):  # as the engine's plugin sends them
        assert metrics[f"mismatch/kl_{origin}"] == pytest.approx(divergence[origins == value].mean())


def test_an_origin_without_tokens_has_no_divergence():
    _, metrics = run(random_inputs(0) | {"origins": np.zeros(MASK.shape, np.int8)}, ObjectiveConfig())
    assert metrics["mismatch/kl_plain"] == pytest.approx(metrics["mismatch/kl"])
    assert not {"mismatch/kl_accepted", "mismatch/kl_bonus"} & metrics.keys()


def test_a_divergence_of_rounding_errors_is_still_a_divergence():
    log_ratio = torch.tensor([[1e-6, -3.1e-6, 7.7e-6, -2.3e-5]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    metrics = finish(mismatch_metrics(log_ratio, everything, ~everything, torch.zeros(1, 4)))
    assert metrics["mismatch/kl"] == pytest.approx(float((log_ratio.double() ** 2 / 2).mean()), rel=1e-4, abs=0)


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_a_ratio_that_is_no_number_is_not_masked_away(correction):
    log_ratio, mask = torch.tensor([[0.0, float("nan")], [0.0, float("inf")]]), torch.ones(2, 2, dtype=torch.bool)
    factor, _ = correction_weights(log_ratio, mask, ObjectiveConfig(correction=correction))
    assert factor[0, 1].isnan()
    assert factor[1].isfinite().all()  # a sampler's probability of 0 is only outside the bounds


@pytest.mark.parametrize("length", [1, 10, 10_000])
def test_the_sequence_mask_does_not_depend_on_length(length):
    log_ratio, mask = torch.full((2, length), 0.6), torch.ones(2, length, dtype=torch.bool)
    log_ratio[1] = 0.8  # e^0.6 < 2 < e^0.8
    factor, changed = correction_weights(log_ratio, mask, ObjectiveConfig(correction="sequence_mask"))
    assert factor[:, 0].tolist() == [1.0, 0.0]
    assert changed.sum(1).tolist() == [0, length]


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_a_ratio_at_a_bound_is_kept(correction):
    log_ratio, mask = torch.tensor([[-0.7, -0.7], [0.7, 0.7]]), torch.ones(2, 2, dtype=torch.bool)
    low, high = log_ratio.exp()[:, 0].tolist()
    bounds = {"correction": correction, "tis_clip": high, "mask_low": low, "mask_high": high}
    factor, changed = correction_weights(log_ratio, mask, ObjectiveConfig(**bounds))
    assert not changed.any()
    assert torch.equal(factor, torch.ones(2, 2) if correction == "sequence_mask" else log_ratio.exp())


def test_a_ratio_at_a_threshold_is_not_above_it():
    thresholds = torch.tensor([[1.1, 1.5, 2.0, 1 / 1.1]], dtype=torch.float64).log()
    thresholds[0, :3] = torch.tensor([np.log(1.1), np.log(1.5), np.log(2)])  # the very numbers
    everything = torch.ones(1, 4, dtype=torch.bool)
    metrics = finish(mismatch_metrics(thresholds, everything, ~everything, torch.zeros(1, 4)))
    assert metrics["mismatch/above_2"] == 0.0
    assert metrics["mismatch/above_1.5"] == 0.25
    assert metrics["mismatch/above_1.1"] == pytest.approx(0.5, abs=0.26), "1 / 1.1 may round to either side"
