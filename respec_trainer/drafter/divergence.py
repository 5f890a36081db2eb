"""The losses a drafter can be trained with: divergences of a draft distribution q from the target's, for each token.

p is the target's distribution over its whole vocabulary, read at the tokens of the draft vocabulary; p~ is p restricted
to the draft vocabulary and renormalized. Sums run over the draft vocabulary.

    kl               KL(p~ || q)                   gradient p~ -> q everywhere: learns from any start
    acceptance       1 - sum_v min(p, q)           1 - the probability that rejection sampling accepts the draft
                                                   (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6)
    log_acceptance   -log sum_v min(p, q)          every draft of a chain has to be accepted: the logarithm of the
                                                   product of the acceptances is minus the sum of these over depths
    mixed            kl + MIX * acceptance

Outside the draft vocabulary q is 0, so no acceptance exceeds p's mass inside it. (As losses for drafters: DistillSpec,
arXiv 2310.08461, which calls 1 - acceptance the total variation.)
"""

from __future__ import annotations

from typing import Literal

import torch

LossKind = Literal["kl", "acceptance", "log_acceptance", "mixed"]

# The gradient of `acceptance` vanishes where q has almost no mass, as at the start of training; that of `kl` does not.
# Total variation is at most 1 and KL at least twice its square (Pinsker). So at equal weights KL is the larger term
# while p and q are far apart, and `acceptance` once they are close: no schedule is needed.
MIX = 1.0


def divergence(kind: LossKind, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """The loss [n] of draft log-probs `log_q` [n, Vd] against the target's `log_p` [n, Vd].

    The exponentials of `log_q` sum to one. `log_p` is normalized over the whole vocabulary, so its exponentials sum to
    one at most. Raises ValueError for an unknown `kind`.
    """
    if kind == "kl":
        return _kl(log_p, log_q)
    if kind == "acceptance":
        return 1 - acceptance(log_p, log_q)
    if kind == "log_acceptance":
        # Computed in logarithms, so that an acceptance too small for float32 still has a gradient.
        return -torch.minimum(log_p, log_q).logsumexp(-1)
    if kind == "mixed":
        return _kl(log_p, log_q) + MIX * (1 - acceptance(log_p, log_q))
    raise ValueError(f"loss {kind!r} is none of kl, acceptance, log_acceptance and mixed")


def acceptance(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum_v min(p, q) [n]: the probability that rejection sampling accepts a draft drawn from q."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_share = log_p.log_softmax(-1)
    return (log_share.exp() * (log_share - log_q)).sum(-1)
