"""The clipped policy-gradient objective, corrected for the sampler's mismatch, and what is worth measuring beside it.

For each response token, with the actor's log-prob now (new) and before the step's updates (old), the engine's log-prob
when it drew the token (sampler), and the response's advantage A:

    r    = exp(new - old)
    loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    PPO (arXiv 1707.06347, eq. 7), GRPO (arXiv 2402.03300)
    w    = min(exp(old - sampler), tis_clip), no gradient         truncated importance sampling

The engine computes the same model's log-probs with other kernels, so its law is not quite the actor's; w corrects the
expectation and the truncation bounds its variance (Ionides 2008, as Yao et al. 2025 use it for rollout engines).
Divergences are Schulman's k3 estimator ("Approximating KL Divergence", 2020): with x drawn from q,
KL(q || p) is the mean of p/q - 1 - log(p/q), which is never negative.
"""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig

Sums = dict[str, torch.Tensor]


def token_weights(mask: torch.Tensor, aggregation: str, tokens: float, sequences: float) -> torch.Tensor:
    """Weight [B, S] of each response token in the loss; the weights of a whole minibatch sum to 1.

    Args:
        mask: [B, S] bool, response tokens of some rows of the minibatch.
        aggregation: "token": every token counts the same; "sequence": every response does.
        tokens, sequences: how many response tokens, and non-empty responses, the whole minibatch has over all
            data-parallel ranks. This is what makes the loss independent of micro-batches and ranks.
    """
    if aggregation == "token":
        return mask / tokens
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * sequences)


def policy_loss(
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    old: torch.Tensor,
    sampler: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    config: ObjectiveConfig,
) -> tuple[torch.Tensor, Sums]:
    """The weighted sum of token losses, and sums over tokens of what `finish_metrics` averages.

    Args:
        logprobs, entropies, old, sampler: [B, S] float32; anything where mask is False.
        advantages: [B]. mask: [B, S] bool. weights: [B, S] from `token_weights`.
    """
    new, old, sampler = (torch.where(mask, t, 0.0) for t in (logprobs, old, sampler))
    ratio = (new - old).exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain, clipped_gain = ratio * advantages[:, None], clipped_ratio * advantages[:, None]
    mismatch = (old - sampler).exp()
    truncated = mismatch > config.tis_clip if config.correction == "tis" else torch.zeros_like(mask)
    correction = mismatch.clamp(max=config.tis_clip) if config.correction == "tis" else torch.ones_like(mismatch)
    loss = -(weights * correction * torch.minimum(gain, clipped_gain)).sum()
    with torch.no_grad():
        sums = {
            "tokens": mask.sum(),
            "policy/loss": loss,
            "policy/kl": (mask * k3(new - old)).sum(),
            "policy/entropy": torch.where(mask, entropies, 0.0).sum(),
            "policy/clip_fraction": (mask & (clipped_gain < gain)).sum(),
            "mismatch/kl": (mask * k3(old - sampler)).sum(),
            "mismatch/clipped": (mask & truncated).sum(),
        }
        sums = {name: value.detach().double() for name, value in sums.items()}
        sums["mismatch/ratio_max"] = torch.where(mask, mismatch, 0.0).max().double()
    return loss, sums


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 of log(p/q) at samples from q; its mean is KL(q || p)."""
    return log_ratio.expm1() - log_ratio


def merge_sums(parts: list[Sums]) -> Sums:
    """Sums of several micro-batches as one: ratio_max is a maximum, all else adds up."""
    merged = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: values.max() if name == "mismatch/ratio_max" else values.sum() for name, values in merged.items()}


def finish_metrics(sums: Sums) -> dict[str, float]:
    """Means over tokens; the loss is already one."""
    tokens = max(float(sums["tokens"]), 1.0)
    whole = {"policy/loss", "mismatch/ratio_max"}
    return {name: float(value) / (1.0 if name in whole else tokens) for name, value in sums.items() if name != "tokens"}
