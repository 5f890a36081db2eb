"""The loss of the unrolled drafter, and the acceptance probability of its drafts at each depth.

At depth k and position t the drafter's distribution q predicts token x_{t+2+k}; p is the target's distribution of it:

    loss   = sum_k decay^k * mean over drafted tokens of divergence(p, q)
    alpha  = sum_v min(p(v), q(v))     probability that verification by rejection sampling accepts the draft
    top1   = p(argmax q)               probability that a sample from the target is the drafter's first choice, which
                                       is what SGLang's default verification of sampled requests accepts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.utils.checkpoint import checkpoint

from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.divergence import LossKind, acceptance, divergence
from respec_trainer.drafter.eagle3 import Eagle3Drafter, shift_left
from respec_trainer.drafter.teacher import TeacherOutput
from respec_trainer.drafter.walk import pass_tokens, verify_passes


@dataclass
class DepthSums:
    """Sums over drafted tokens, [K] each; the sums of several batches can be added. Row weights affect `loss` alone.

    `passes` and `gained` are counted along the responses (walk.py), entry s - 1 for chains of s drafts. They are 0 if
    TeacherOutput has no `draft_ids`.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    alpha: torch.Tensor
    top1: torch.Tensor
    tokens: torch.Tensor
    passes: torch.Tensor  # verify passes that the responses would have taken
    gained: torch.Tensor  # tokens that those passes yield; the same for every s

    def __add__(self, other: DepthSums) -> DepthSums:
        return DepthSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def means(self) -> dict[str, list[float]]:
        """The means: "loss", "alpha" and "top1" per depth, and "accept_length" per s.

        A depth at which nothing was drafted has 0, an s without passes has accept length 1.
        """
        tokens = self.tokens.clamp(min=1)
        return {
            "loss": _weighted_mean(self.loss, self.weight).tolist(),
            "alpha": (self.alpha / tokens).tolist(),
            "top1": (self.top1 / tokens).tolist(),
            "accept_length": torch.where(self.passes > 0, self.gained / self.passes.clamp(min=1), 1.0).tolist(),
        }


def distill_loss(
    drafter: Eagle3Drafter,
    batch: DrafterBatch,
    target: TeacherOutput,
    steps: int,
    decay: float = 0.8,
    chunk: int = 1024,
    kind: LossKind = "kl",
    totals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DepthSums]:
    """Return the loss of `batch` over `steps` unrolled steps, a scalar with gradient, and its sums per depth, without.

    The loss is a mean over rows weighted by `batch.weights`: equal weights change nothing, and a row of weight zero
    does not affect it. The draft logits of at most `chunk` tokens are in memory at one time.

    `totals` [K] are the `drafted_weights` of all rows of an update of which `batch` is a part: the losses of the parts
    then add up to that of all rows together. None: the batch is the whole.
    """
    row_of = (batch.response_mask.flatten().cumsum(0) - 1).view_as(batch.response_mask)  # into target's M rows
    columns = []
    hits = torch.zeros(*batch.tokens.shape, steps, dtype=torch.bool, device=batch.tokens.device)
    for k, hidden in enumerate(drafter.unroll(target.embeddings, target.features, steps)):
        drafted = drafted_positions(batch.response_mask, k)
        weights = batch.weights[:, None].expand_as(drafted)[drafted]
        rows = shift_left(row_of, 2 + k)[drafted]
        *sums, choices = _compare_chunks(drafter, hidden[drafted], target, rows, weights, chunk, kind)
        columns.append((*sums, weights.sum(), drafted.sum().float()))
        if target.draft_ids is not None:
            hits[..., k][drafted] = target.draft_ids[choices] == shift_left(batch.tokens, 2 + k)[drafted]
    loss, alpha, top1, weight, tokens = (torch.stack(column) for column in zip(*columns, strict=True))
    decays = decay ** torch.arange(steps, device=loss.device, dtype=torch.float32)
    total = (decays * _weighted_mean(loss, weight if totals is None else totals)).sum()
    walked = target.draft_ids is not None
    passes = verify_passes(hits, batch.response_mask).sum(0).float() * walked
    gained = pass_tokens(batch.response_mask).sum().float().expand(steps) * walked
    return total, DepthSums(loss.detach(), weight, alpha.detach(), top1.detach(), tokens, passes, gained)


def drafted_positions(response_mask: torch.Tensor, depth: int) -> torch.Tensor:
    """Mark [B, S] the positions t where serving drafts x_{t+2+depth}: x_{t+1} and x_{t+2+depth} are response tokens."""
    return shift_left(response_mask, 1) & shift_left(response_mask, 2 + depth)


def drafted_weights(responses: torch.Tensor, weights: torch.Tensor, steps: int) -> torch.Tensor:
    """The sum over all drafted tokens of their rows' weights, at each of `steps` depths: [K] in float64.

    `responses` [B] are the numbers of response tokens, of which R - 1 - k are drafted at depth k; `weights` [B].
    """
    counts = (responses[:, None] - 1 - torch.arange(steps, device=responses.device)).clamp(min=0)
    return (weights.double()[:, None] * counts).sum(0)


def predicted_accept_length(acceptance: Sequence[float], steps: int) -> float:
    """Predict the tokens per verify pass of a chain of `steps` drafts, the bonus token included: 1 + sum of products.

    The product of the first d entries of `acceptance` is the probability that d drafts or more are accepted, if depths
    are independent and responses never end. Neither is true, so the prediction is too high. For drafts that are the
    drafter's first choice, walk.py counts exactly. Raises ValueError if `acceptance` has fewer than `steps` entries.
    """
    if len(acceptance) < steps:
        raise ValueError(f"acceptance was measured at {len(acceptance)} depths, fewer than {steps} draft steps")
    return 1.0 + torch.tensor(acceptance[:steps], dtype=torch.float64).cumprod(0).sum().item()


def _compare_chunks(drafter, hidden, target, rows, weights, chunk: int, kind: LossKind) -> tuple[torch.Tensor, ...]:
    """Call `_compare` on chunks, add its sums and join its choices. The backward pass computes the logits again."""
    parts = list(zip(hidden.split(chunk), rows.split(chunk), weights.split(chunk), strict=True))
    again = torch.is_grad_enabled() and len(parts) > 1
    totals = []
    for part, row, weight in parts:
        arguments = (drafter, part, target, row, weight, kind)
        if again:
            totals.append(checkpoint(_compare, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            totals.append(_compare(*arguments))
    *sums, choices = zip(*totals, strict=True)
    return (*(sum(column) for column in sums), torch.cat(choices))


def _compare(drafter, hidden, target: TeacherOutput, rows, weights, kind: LossKind) -> tuple[torch.Tensor, ...]:
    """The sums of weighted loss, alpha and top1 of the drafts from `hidden` [n, H], and the chosen draft ids [n].

    `rows` [n] are indices of the target's rows.
    """
    log_q = drafter.logits(hidden).float().log_softmax(-1)
    log_p = target.draft_logits[rows].float() - target.logsumexp[rows, None]
    losses = divergence(kind, log_p, log_q)
    with torch.no_grad():
        choices = log_q.argmax(-1)
        alpha = acceptance(log_p, log_q).sum()
        top1 = log_p.gather(-1, choices[:, None]).exp().sum()
    return (losses * weights).sum(), alpha, top1, choices


def _weighted_mean(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return total / weight, and 0 where the weight is 0; NaN where it is NaN."""
    return torch.where(weight == 0, 0.0, total / torch.where(weight == 0, 1.0, weight))
