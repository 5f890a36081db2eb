"""Log-probs and entropies of given tokens, when each rank has the logits of only part of the vocabulary.

With logits l over the vocabulary, log Z = logsumexp(l), p = exp(l - log Z):

    log p_y = l_y - log Z          d log p_y / d l_j = [j = y] - p_j
    H = log Z - sum_j p_j l_j      d H / d l_j = -p_j (log p_j + H)

After truncation the sums go over the kept tokens only, and p_j = 0 for the others. A given token is always kept: it was
drawn, and rounding may leave it just beyond the edge of what is kept here.

Computed for one chunk of tokens at a time, and again in the backward pass, so that logits of the whole batch are never
in memory. All numbers are float32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from respec_trainer.actor.truncation import Truncation

# The logit of padded vocabulary rows. Its exp is exactly 0; it is finite so that 0 * log 0 is 0.
NEVER = -1.0e30


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size: int, temperature: float, truncation: Truncation, group):
        """Map logits [n, V / tp] and targets [n] to log-probs, entropies and log Z, [n] each, equal on every rank.

        log Z is that of the whole vocabulary, also after truncation.
        """
        first = dist.get_rank(group) * logits.shape[1]
        # In this order, so that no temperature changes the mask.
        scores = mask_padding(logits.to(torch.float32, copy=True).div_(temperature), first, vocab_size)
        top = scores.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        scores -= top[:, None]
        mine = (targets >= first) & (targets < first + logits.shape[1])
        column = torch.where(mine, targets - first, 0)
        chosen = scores.gather(1, column[:, None])[:, 0]
        weights = scores.exp()
        whole = weights.sum(-1)
        if not truncation.keeps_all:
            kept = truncation.kept(scores, group)
            kept[mine, column[mine]] = True
            scores.masked_fill_(~kept, NEVER)
            weights.masked_fill_(~kept, 0)
        sums = torch.stack([chosen * mine, weights.sum(-1), (weights * scores).sum(-1), whole])
        dist.all_reduce(sums, group=group)
        log_z = sums[1].log()
        entropy = log_z - sums[2] / sums[1]
        ctx.save_for_backward(scores.sub_(log_z[:, None]), entropy, column, mine)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.temperature = logits.dtype, temperature
        log_whole = sums[3].log() + top
        ctx.mark_non_differentiable(log_whole)
        return sums[0] - log_z, entropy, log_whole

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy, _):
        logprobs, entropy, column, mine = ctx.saved_tensors
        grad = torch.zeros_like(logprobs)
        if grad_logprob is not None:
            grad.sub_(logprobs.exp().mul_(grad_logprob[:, None]))
            grad.scatter_add_(1, column[:, None], (grad_logprob * mine)[:, None])
        if grad_entropy is not None:
            grad.sub_(logprobs.exp().mul_(logprobs + entropy[:, None]).mul_(grad_entropy[:, None]))
        return grad.div_(ctx.temperature).to(ctx.dtype), None, None, None, None, None


def mask_padding(logits: torch.Tensor, first: int, vocab_size: int) -> torch.Tensor:
    """Overwrite the logits [n, V / tp] of padding after the true vocabulary; `first` is the token id of column 0."""
    logits[:, max(vocab_size - first, 0) :] = NEVER
    return logits


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    truncation: Truncation,
    chunk: int,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-prob of each target, and entropy and log-sum-exp, of softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [n, H], whole on every rank. The caller must sum its gradient over `group`.
        weight: [V / tp, H], this rank's vocabulary rows, the padded ones at the end.
        targets: [n] token ids.
        vocab_size: the true vocabulary size, without padding.
        truncation: the log-probs and entropies are of the distribution that it leaves. A target is always kept.
        chunk: tokens whose logits are in memory at one time.

    Returns three float32 tensors [n]. The log-sum-exps, of all logits / temperature, have no gradient.
    """

    def score(part: torch.Tensor, wanted: torch.Tensor, rows: torch.Tensor):
        return _VocabParallelLogProb.apply(part @ rows.t(), wanted, vocab_size, temperature, truncation, group)

    starts = range(0, max(len(targets), 1), chunk)  # without targets, one empty chunk keeps the graph connected
    pairs = [(hidden[start : start + chunk], targets[start : start + chunk]) for start in starts]
    if torch.is_grad_enabled():
        # No random numbers are drawn, so there is no random state to restore.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        scored = [checkpoint(score, part, wanted, weight, **options) for part, wanted in pairs]
    else:
        scored = [score(part, wanted, weight) for part, wanted in pairs]
    return tuple(torch.cat(column) for column in zip(*scored, strict=True))
