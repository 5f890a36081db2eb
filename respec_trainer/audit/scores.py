"""Scores of draws: the class of a token by its rank, and its surprisal; summed over draws that all differ in their law.

Each law p is divided into classes by rank: the likeliest token, the second, the third, the fourth to eighth, and the
rest. The scores g(v) of a token v are its class, one 0 or 1 for each, and its surprisal -log p(v). A draw y from p has
X = g(y) - E_p[g], with mean 0. If it was drawn from another law q with a known q(y), as an engine that rounds
differently or has older weights does, it is counted with rho = p(y) / q(y): X = rho (g(y) - E_p[g]) has mean
E_q[X] = E_p[g - E_p[g]] = 0 exactly, whatever q is, as long as q covers p.

Where top_p or top_k cut both laws, q may lack a token at the edge that p has. So only draws among the tokens that are
certain to be kept count, and E_p is given that the token is one of these.

Shapes: R laws, V vocabulary, T draws, C classes, F = C + 1 scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot

from respec_trainer.audit.law import Laws
from respec_trainer.audit.statistics import Evidence
from respec_trainer.audit.sums import ScoreSums

FIRST_RANKS = (0, 1, 2, 3, 8)  # the first rank of each class
HIGHEST_SURPRISAL = 16.0  # nats; a rarer token, or one of probability 0, scores this
UNCERTAIN = 0.97  # the actor is uncertain where no token has this probability or more


@dataclass(frozen=True)
class Draws:
    """T different draws and how often each was drawn. Entry t is for token `tokens[t]` from law `rows[t]`."""

    rows: torch.Tensor  # [T] int64
    tokens: torch.Tensor  # [T] int64
    counts: torch.Tensor  # [T] float64
    ratios: torch.Tensor  # [T] float64: rho


@dataclass(frozen=True)
class Moments:
    """What each of R laws says about the scores of a draw that is certain."""

    mass: torch.Tensor  # [R] probability that a draw is certain
    means: torch.Tensor  # [R, F]
    covariances: torch.Tensor  # [R, F, F]
    fourth: torch.Tensor  # [R] fourth central moment of the surprisal
    uncertain: torch.Tensor  # [R] bool


@dataclass(frozen=True)
class Strata:
    """The sums where the actor is uncertain, and where it is sure. Strata of parts can be added.

    They are tested apart, because the rare tokens that show an error where the actor is sure would be lost in the
    variance of the others. Their evidence is independent, so it adds up.
    """

    uncertain: ScoreSums
    sure: ScoreSums

    def __add__(self, other: Strata) -> Strata:
        return Strata(self.uncertain + other.uncertain, self.sure + other.sure)

    def times(self, factor: float) -> Strata:
        return Strata(self.uncertain.times(factor), self.sure.times(factor))

    @property
    def whole(self) -> ScoreSums:
        return self.uncertain + self.sure

    def classes(self) -> Evidence:
        return self.uncertain.classes() + self.sure.classes()

    def surprisal(self) -> Evidence:
        return self.uncertain.surprisal() + self.sure.surprisal()

    def both(self) -> Evidence:
        return self.uncertain.both() + self.sure.both()

    def state_dict(self) -> dict:
        return {name: sums.state_dict() for name, sums in vars(self).items()}

    @classmethod
    def of_state(cls, state: dict) -> Strata:
        return cls(**{name: ScoreSums.of_state(sums) for name, sums in state.items()})


def strata(laws: Laws, draws: Draws) -> Strata:
    """Sum the scores of draws, apart by whether the actor was uncertain."""
    ranked = Ranked.of(laws)
    moments = ranked.moments()
    unsure = moments.uncertain[draws.rows]
    parts = (replace(draws, counts=draws.counts * share) for share in (unsure, ~unsure))
    return Strata(*(score_sums(laws, part, ranked, moments) for part in parts))


def score_sums(laws: Laws, draws: Draws, ranked: Ranked, moments: Moments) -> ScoreSums:
    """Sum the scores of draws from laws with this order and these moments."""
    scores = ranked.scores(draws.rows, draws.tokens)
    inside = laws.certain[draws.rows, draws.tokens]
    centred = (scores - moments.means[draws.rows]) * inside[:, None]
    visits = torch.zeros(len(laws), dtype=torch.float64).index_add_(0, draws.rows, draws.counts)
    reached = visits * moments.mass
    ratios = torch.where(inside, draws.ratios, 0.0)
    excess = ratios**2 - ratios
    sizes = torch.cat([torch.ones_like(centred[:, :-1]), centred[:, -1:] ** 2], 1)
    beyond = ratios - moments.mass[draws.rows]
    return ScoreSums(
        difference=((draws.counts * ratios)[:, None] * centred).sum(0).numpy(),
        expected=(reached[:, None, None] * moments.covariances).sum(0).numpy(),
        excess=(centred.T @ ((draws.counts * excess)[:, None] * centred)).numpy(),
        largest=(draws.counts @ (excess[:, None] * sizes) ** 4).numpy(),
        fourth=float((reached * moments.fourth).sum()),
        ratio=float((draws.counts * beyond).sum()),
        ratio_square=float((draws.counts * beyond**2).sum()),
        draws=float(draws.counts.sum()),
        reached=float(reached.sum()),
    )


@dataclass(frozen=True)
class Ranked:
    """Laws in descending order."""

    probs: torch.Tensor  # [R, V] float64, 0 for tokens that are not certain
    surprisals: torch.Tensor  # [R, V]
    ranks: torch.Tensor  # [R, V] rank of each token of the vocabulary

    @classmethod
    def of(cls, laws: Laws) -> Ranked:
        ordered, order = laws.probs.sort(stable=True, dim=-1, descending=True)
        places = torch.arange(order.shape[1]).expand_as(order)
        surprisals = (-ordered.log()).clamp(max=HIGHEST_SURPRISAL)
        inside = laws.certain.gather(1, order)
        return cls(ordered * inside, surprisals, torch.empty_like(order).scatter_(1, order, places))

    @property
    def firsts(self) -> torch.Tensor:
        return torch.tensor([first for first in FIRST_RANKS if first < self.probs.shape[1]])

    def scores(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, F] of the tokens."""
        ranks = self.ranks[rows, tokens]
        classes = one_hot(torch.bucketize(ranks, self.firsts, right=True) - 1, len(self.firsts))
        return torch.cat([classes.double(), self.surprisals[rows, ranks][:, None]], 1)

    def moments(self) -> Moments:
        mass = self.probs.sum(1)
        given = self.probs / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        classes, products = self._by_class(given), self._by_class(given * self.surprisals)
        means = torch.cat([classes, products.sum(1, keepdim=True)], 1)
        away = self.surprisals - means[:, -1:]
        second = torch.diag_embed(torch.cat([classes, (given * self.surprisals**2).sum(1, keepdim=True)], 1))
        second[:, :-1, -1] = second[:, -1, :-1] = products
        covariances = second - means[:, :, None] * means[:, None, :]
        return Moments(mass, means, covariances, (given * away**4).sum(1), given.amax(1) < UNCERTAIN)

    def _by_class(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values [R, V] over the ranks of each class, [R, C]."""
        sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
        return sums[:, [*self.firsts.tolist(), -1]].diff(dim=1)
