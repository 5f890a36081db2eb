"""The loss of the unrolled drafter, and how likely its drafts are to be accepted, depth by depth.

At depth k and position t the drafter's q predicts token x_{t+2+k}, of which the target said p. With p~ the target's
distribution restricted to the draft vocabulary and renormalized:

    loss   = sum_k decay^k * mean over drafted tokens of KL(p~ || q)
    alpha  = sum_v min(p(v), q(v))     how often verification by rejection sampling accepts the draft
    top1   = p(argmax q)               how often sampling from the target hits the drafter's first choice, which is
                                       what SGLang's default verification of sampled requests accepts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.utils.checkpoint import checkpoint

from respec_trainer.drafter.eagle3 import Eagle3Drafter, shift_left
from respec_trainer.drafter.rollouts import Rollouts
from respec_trainer.drafter.teacher import TeacherOutput


@dataclass
class DepthSums:
    """Sums over drafted tokens, [K] each, so that those of batches add up. Row weights count in `loss` alone."""

    loss: torch.Tensor
    weight: torch.Tensor
    alpha: torch.Tensor
    top1: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: DepthSums) -> DepthSums:
        return DepthSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def means(self) -> dict[str, list[float]]:
        """Per depth: "loss", "alpha" and "top1"; 0 at a depth where nothing was drafted."""
        tokens = self.tokens.clamp(min=1)
        return {
            "loss": _weighted_mean(self.loss, self.weight).tolist(),
            "alpha": (self.alpha / tokens).tolist(),
            "top1": (self.top1 / tokens).tolist(),
        }


def distill_loss(
    drafter: Eagle3Drafter, batch: Rollouts, target: TeacherOutput, steps: int, decay: float = 0.8, chunk: int = 1024
) -> tuple[torch.Tensor, DepthSums]:
    """The loss of `batch` over `steps` unrolled steps, a scalar with gradient, and its per-depth sums without.

    Rows are weighted by `batch.weights`: a weighted mean, so weights all alike change nothing and a row of weight
    zero leaves no trace in the loss. At most `chunk` tokens' draft logits exist at one time.
    """
    row_of = (batch.response_mask.flatten().cumsum(0) - 1).view_as(batch.response_mask)  # into target's M rows
    columns = []
    for k, hidden in enumerate(drafter.unroll(target.embeddings, target.features, steps)):
        drafted = drafted_positions(batch.response_mask, k)
        weights = batch.weights[:, None].expand_as(drafted)[drafted]
        sums = _compare_chunks(drafter, hidden[drafted], target, shift_left(row_of, 2 + k)[drafted], weights, chunk)
        columns.append((*sums, weights.sum(), drafted.sum().float()))
    loss, alpha, top1, weight, tokens = (torch.stack(column) for column in zip(*columns, strict=True))
    decays = decay ** torch.arange(steps, device=loss.device, dtype=torch.float32)
    total = (decays * _weighted_mean(loss, weight)).sum()
    return total, DepthSums(loss.detach(), weight, alpha.detach(), top1.detach(), tokens)


def drafted_positions(response_mask: torch.Tensor, depth: int) -> torch.Tensor:
    """Positions t [B, S] where serving drafts x_{t+2+depth}: x_{t+1} was sampled, the draft is a response's."""
    return shift_left(response_mask, 1) & shift_left(response_mask, 2 + depth)


def predicted_accept_length(top1: Sequence[float], steps: int) -> float:
    """Tokens gained per verification of `steps` drafts in a chain, the bonus token included: 1 + sum of products.

    The product of the first d entries of `top1` is the chance that d drafts or more are accepted. This takes depths as
    independent and leaves out that responses end, so the engine measures a little less.
    """
    if len(top1) < steps:
        raise ValueError(f"acceptance was measured at {len(top1)} depths, fewer than {steps} draft steps")
    return 1.0 + torch.tensor(top1[:steps], dtype=torch.float64).cumprod(0).sum().item()


def _compare_chunks(drafter, hidden, target: TeacherOutput, rows, weights, chunk: int) -> tuple[torch.Tensor, ...]:
    """`_compare` summed over chunks, whose logits are computed again in the backward pass."""
    parts = list(zip(hidden.split(chunk), rows.split(chunk), weights.split(chunk), strict=True))
    again = torch.is_grad_enabled() and len(parts) > 1
    totals = []
    for part, row, weight in parts:
        arguments = (drafter, part, target, row, weight)
        if again:
            totals.append(checkpoint(_compare, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            totals.append(_compare(*arguments))
    return tuple(sum(column) for column in zip(*totals, strict=True))


def _compare(drafter, hidden, target: TeacherOutput, rows, weights) -> tuple[torch.Tensor, ...]:
    """Weighted KL, alpha and top1 of the drafts from `hidden` [n, H], summed; `rows` [n] index the target's rows."""
    log_q = drafter.logits(hidden).float().log_softmax(-1)
    logits = target.draft_logits[rows].float()
    log_p = logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    with torch.no_grad():
        whole = (logits - target.logsumexp[rows, None]).exp()
        alpha = torch.minimum(whole, log_q.exp()).sum()
        top1 = whole.gather(-1, log_q.argmax(-1, keepdim=True)).sum()
    return (divergence * weights).sum(), alpha, top1


def _weighted_mean(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total / weight, and 0 where the weight is 0."""
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1.0), 0.0)
