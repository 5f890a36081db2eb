"""How far a draft distribution q is from the target's: the losses a drafter can be trained with, token by token.

p is the target's distribution over its whole vocabulary, looked at where the draft vocabulary is; p~ is p restricted
to the draft vocabulary and renormalized. Sums run over the draft vocabulary.

    kl               KL(p~ || q)                   gradient p~ -> q everywhere: learns from any start
    acceptance       1 - sum_v min(p, q)           1 - the probability that rejection sampling accepts the draft
                                                   (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6)
    log_acceptance   -log sum_v min(p, q)          drafts in a chain all have to be accepted, and the logarithm of a
                                                   product of acceptances is the sum of these over its depths
    mixed            kl + MIX * acceptance

Outside the draft vocabulary q is 0, so no acceptance exceeds p's mass inside it. (As losses for drafters: DistillSpec,
arXiv 2310.08461, which calls 1 - acceptance the total variation.)
"""

from __future__ import annotations

from typing import Literal

import torch

LossKind = Literal["kl", "acceptance", "log_acceptance", "mixed"]

# The gradient of `acceptance` vanishes where q has no mass that it could raise, as at the start; that of `kl` does not.
# Total variation is at most 1 and KL at least twice its square (Pinsker), so at equal weights KL leads while the two
# are far apart and acceptance once they are near: the loss passes from one to the other by itself, without a schedule.
MIX = 1.0


def divergence(kind: LossKind, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """The loss [n] of draft log-probs `log_q` [n, Vd], which sum to one, under the target's `log_p` [n, Vd].

    `log_p` is normalized over the whole vocabulary, so its exponentials sum to one at most.
    """
    if kind == "kl":
        return _kl(log_p, log_q)
    if kind == "acceptance":
        return 1 - acceptance(log_p, log_q)
    if kind == "log_acceptance":
        # In logarithms throughout, so that an acceptance too small for float32 still has a gradient.
        return -torch.minimum(log_p, log_q).logsumexp(-1)
    if kind == "mixed":
        return _kl(log_p, log_q) + MIX * (1 - acceptance(log_p, log_q))
    raise ValueError(f"loss {kind!r} is none of kl, acceptance, log_acceptance and mixed")


def acceptance(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum_v min(p, q) [n]: how often rejection sampling accepts what is drawn from q."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_share = log_p.log_softmax(-1)
    return (log_share.exp() * (log_share - log_q)).sum(-1)
