"""The mismatch between sampler and actor: its metrics, and the correction of the loss for it.

The engine computes the same model's log-probs with other kernels, so its distribution is not quite the actor's. With
the actor's log-prob before the step's updates (old) and the engine's when it drew the token (sampler),
rho_t = exp(old - sampler) is the importance ratio of token t. It has no gradient. A token's loss is multiplied by

    none            1
    tis             min(rho_t, tis_clip)                          truncated importance sampling (Ionides 2008, as Yao
                                                                  et al. 2025 use it for rollout engines)
    token_mask      rho_t if mask_low <= rho_t <= mask_high       masked importance sampling of tokens (IcePop, Ling
                    else 0                                        team 2025)
    sequence_mask   1 if mask_low <= rho_geo <= mask_high else 0  geometric sequence masking (Li and Liu, "Trust Region
                    with rho_geo = (rho_1 ... rho_T)^(1/T)        Optimization via Sequence Masking", 2025, section 3)

The last is the length-independent form of sequence-level masked importance sampling (Liu et al., "When Speed Kills
Stability", 2025). That method masks and weighs by the product of a response's ratios, which leaves any fixed bounds as
responses grow longer.

Masked tokens stay in the loss's denominator, which is that of the whole minibatch. So a mask does not increase the
weight of the other tokens, and a step that is mostly masked is a small step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.kl import k3
from respec_trainer.objective.metrics import Metrics, Tokens
from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED

ORIGINS = {"plain": UNDRAFTED, "accepted": ACCEPTED, "bonus": BONUS}  # by their names in metrics
THRESHOLDS = (1.1, 1.5, 2)  # of max(rho, 1 / rho), above which a token is counted


def correction_weights(
    log_ratio: torch.Tensor, mask: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of each token's loss, and True where truncation or a mask changed it; both [B, S].

    Args:
        log_ratio: [B, S], old - sampler, 0 outside the response. mask: [B, S] bool, the response tokens of whole rows.

    A NaN ratio gives a NaN factor, not 0: the loss is then not finite, and the step is refused.
    """
    ratio = log_ratio.exp()
    if config.correction == "tis":
        return ratio.clamp(max=config.tis_clip), mask & (ratio > config.tis_clip)
    if config.correction == "token_mask":
        outside = _outside(ratio, config)
        return torch.where(outside, 0.0, ratio), mask & outside
    if config.correction == "sequence_mask":
        geometric = (log_ratio.sum(1) / mask.sum(1).clamp(min=1)).exp()
        outside = _outside(geometric, config)
        factor = torch.where(geometric.isnan(), geometric, (~outside).to(ratio.dtype))
        return factor[:, None].expand_as(ratio), mask & outside[:, None]
    return torch.ones_like(ratio), torch.zeros_like(mask)


def _outside(ratio: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    return (ratio < config.mask_low) | (ratio > config.mask_high)


@torch.no_grad()
def mismatch_metrics(
    log_ratio: torch.Tensor,
    mask: torch.Tensor,
    changed: torch.Tensor,
    origins: torch.Tensor,
    names: Mapping[str, int] = ORIGINS,
) -> Metrics:
    """The `mismatch/*` metrics: k3 estimates of the divergence for all tokens and by origin, extremes and shares.

    Only the mean over all tokens estimates a KL divergence. The origin depends on the token drawn, so the means by
    origin are not divergences: they split the sum by how easy tokens are to draft.

    Args:
        log_ratio, mask: as for `correction_weights`, which returns `changed`.
        origins: [B, S] int8, as Sample.origins. names: the origins to report, by their names.
    """
    # In float64: if sampler and actor nearly agree, k3 is a small difference of two nearly equal numbers.
    log_ratio = log_ratio.double()
    ratio, divergence, distance, tokens = log_ratio.exp(), k3(log_ratio), log_ratio.abs(), Tokens(mask)
    metrics = {"mismatch/kl": tokens.mean(divergence), "mismatch/clipped": tokens.mean(changed)}
    for threshold in THRESHOLDS:
        metrics[f"mismatch/above_{threshold}"] = tokens.mean(distance > math.log(threshold))
    for name, origin in names.items():
        metrics[f"mismatch/kl_{name}"] = Tokens(mask & (origins == origin), empty=None).mean(divergence)
    extremes = {"mismatch/ratio_max": tokens.largest(ratio), "mismatch/ratio_min": tokens.smallest(ratio)}
    return metrics | extremes
