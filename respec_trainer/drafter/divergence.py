"""The losses a drafter can be trained with: divergences of a draft distribution q from the target's, for each token.

p is the target's distribution over its whole vocabulary, read at the tokens of the draft vocabulary, where it has the
mass m = sum_v p; p~ = p / m. Sums run over the draft vocabulary.

    kl               m KL(p~ || q)                 gradient m (q - p~) in the logits, that of -sum_v p log q: learns
                                                   from any start
    acceptance       1 - sum_v min(p, q)           1 - the probability that rejection sampling accepts the draft
                                                   (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6)
    log_acceptance   -m log(sum_v min(p, q) / m)   every draft of a chain has to be accepted: where m is 1, the
                                                   logarithm of the product of the acceptances is minus the sum of
                                                   these over depths
    mixed            kl + MIX * acceptance

Outside the draft vocabulary q is 0, so no acceptance exceeds m. A token therefore counts in proportion to m: where the
target will draw a token that cannot be drafted, little can be won. Without the factor m, `kl` and `log_acceptance`
would give such tokens as much weight as any. `kl` and `log_acceptance` are 0 at q = p~; `acceptance` is 1 - m there.
(As losses for drafters: DistillSpec, arXiv 2310.08461, which calls 1 - acceptance the total variation.)
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
        mass = log_p.logsumexp(-1)
        return mass.exp() * (mass - torch.minimum(log_p, log_q).logsumexp(-1))
    if kind == "mixed":
        return _kl(log_p, log_q) + MIX * (1 - acceptance(log_p, log_q))
    raise ValueError(f"loss {kind!r} is none of kl, acceptance, log_acceptance and mixed")


def acceptance(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum_v min(p, q) [n]: the probability that rejection sampling accepts a draft drawn from q."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p.log_softmax(-1) - log_q)).sum(-1)
