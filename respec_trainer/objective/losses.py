"""Losses of a policy's tokens, and metrics of the policy."""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.kl import k3
from respec_trainer.objective.metrics import Metrics, Tokens
from respec_trainer.objective.mismatch import correction_weights, mismatch_metrics


def clipped_policy_gradient(inputs: LossInputs, config: ObjectiveConfig) -> tuple[torch.Tensor, Metrics]:
    """The clipped policy-gradient loss, corrected for the sampler's mismatch; no KL term.

        r    = exp(logprobs - old)
        loss = -sum of weight * rho * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) over tokens

    Source: PPO (arXiv 1707.06347, eq. 7), as GRPO uses it (arXiv 2402.03300, eq. 3); separate clip_low and clip_high:
    DAPO (arXiv 2503.14476, section 3.1). rho is the factor of objective.correction, without a gradient; see
    mismatch.py.
    """
    mismatch = inputs.log_mismatch
    gains, clipped = clipped_gains(inputs.log_ratio.exp(), inputs.advantages[:, None], config)
    correction, changed = correction_weights(mismatch, inputs.mask, config)
    loss = -(inputs.weights * correction * gains).sum()
    metrics = policy_metrics(inputs) | {"policy/clip_fraction": Tokens(inputs.mask).mean(clipped)}
    return loss, metrics | mismatch_metrics(mismatch, inputs.mask, changed, inputs.origins)


def clipped_gains(
    ratio: torch.Tensor, advantages: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r) A) of each token, and True where the clipped term is the smaller: such a token has no gradient.

    ratio: [B, S]. advantages: [B, S] or [B, 1]. Both results are [B, S].
    """
    gains = ratio * advantages
    limited = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    return torch.minimum(gains, limited), limited < gains


@torch.no_grad()
def policy_metrics(inputs: LossInputs) -> Metrics:
    """policy/kl, the k3 estimate of KL(old || now), and policy/entropy: means over the response tokens, in nats."""
    tokens = Tokens(inputs.mask)
    return {"policy/kl": tokens.mean(k3(inputs.log_ratio)), "policy/entropy": tokens.mean(inputs.entropies)}
