"""The clipped policy-gradient objective, corrected for the sampler's mismatch, and what is worth measuring beside it.

For each response token, with the actor's log-prob now (new) and before the step's updates (old), the engine's log-prob
when it drew the token (sampler), and the response's advantage A:

    r    = exp(new - old)
    loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    PPO (arXiv 1707.06347, eq. 7), GRPO (arXiv 2402.03300)
    w    = of old - sampler, no gradient                          see mismatch.py

Divergences are Schulman's k3 estimator ("Approximating KL Divergence", 2020): with x drawn from q,
KL(q || p) is the mean of p/q - 1 - log(p/q), which is never negative.
"""

from __future__ import annotations

import torch

from respec_trainer.actor.mismatch import EXTREMES, ORIGINS, Sums, correction_weights, k3, mismatch_sums
from respec_trainer.config import ObjectiveConfig

UPDATE_MEANS = ("policy/loss", "policy/grad_norm", "policy/lr")  # one number an update; all else is of tokens
ORIGIN_COUNTS = {f"mismatch/kl_{origin}": f"tokens_{origin}" for origin in ORIGINS}


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
    origins: torch.Tensor,
    config: ObjectiveConfig,
) -> tuple[torch.Tensor, Sums]:
    """The weighted sum of token losses, and sums over tokens of what `finish_metrics` averages.

    Args:
        logprobs, entropies, old, sampler: [B, S] float32; anything where mask is False.
        advantages: [B]. mask: [B, S] bool, whole rows. weights: [B, S] from `token_weights`. origins: [B, S] int8.
    """
    new, old, sampler = (torch.where(mask, t, 0.0) for t in (logprobs, old, sampler))
    ratio = (new - old).exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain, clipped_gain = ratio * advantages[:, None], clipped_ratio * advantages[:, None]
    correction, changed = correction_weights(old - sampler, mask, config)
    loss = -(weights * correction * torch.minimum(gain, clipped_gain)).sum()
    with torch.no_grad():
        sums = {
            "tokens": mask.sum(),
            "policy/loss": loss,
            "policy/kl": (mask * k3(new - old)).sum(),
            "policy/entropy": torch.where(mask, entropies, 0.0).sum(),
            "policy/clip_fraction": (mask & (clipped_gain < gain)).sum(),
        }
    sums = {name: value.detach().double() for name, value in sums.items()}
    return loss, sums | mismatch_sums(old - sampler, mask, changed, origins)


def merge_sums(parts: list[Sums]) -> Sums:
    """Sums of several micro-batches or minibatches as one: extremes are compared, all else adds up."""
    merged = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    extremes = {name: sign * (sign * merged[name]).max() for name, sign in EXTREMES.items()}
    return {name: values.sum() for name, values in merged.items() if name not in EXTREMES} | extremes


def finish_metrics(sums: Sums, updates: int = 1) -> dict[str, float]:
    """Means over tokens, and of the loss over updates. What is of tokens of one origin is left out where none is."""
    values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))  # one copy from the device
    metrics = {}
    for name, value in values.items():
        count = values[ORIGIN_COUNTS.get(name, "tokens")]
        if name in UPDATE_MEANS:
            metrics[name] = value / updates
        elif name in EXTREMES and count:
            metrics[name] = value
        elif name in ORIGIN_COUNTS and count:
            metrics[name] = value / count
        elif name not in (*EXTREMES, *ORIGIN_COUNTS, *ORIGIN_COUNTS.values(), "tokens"):
            metrics[name] = value / max(count, 1.0)
    return metrics
