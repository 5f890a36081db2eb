"""The law that a rollout engine must follow: the actor's next-token law after the sampling parameters are applied.

Shapes: R prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from respec_trainer.rollout.sample import SamplingParams

# Engine and actor may differ about which tokens top_k and top_p keep. Tokens that both keep as long as they agree about
# the odds of any two sets of tokens up to a factor are certain. Rounding in bf16 changes odds by a factor of 1.3.
ODDS = 3.0
FLOAT32_ODDS = 1.001


@dataclass(frozen=True)
class Laws:
    """The laws after R prefixes."""

    probs: torch.Tensor  # [R, V] float64
    certain: torch.Tensor  # [R, V] bool: tokens with a positive probability for every engine that rounds differently

    def __len__(self) -> int:
        return len(self.probs)


def laws(logits: torch.Tensor, params: SamplingParams, odds: float = ODDS) -> Laws:
    """Return the laws from logits [R, V], where engine and actor agree about odds up to this factor."""
    return Laws(shaped(logits, params), certain(logits, params, odds))


def shaped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return probabilities [R, V] in float64 from logits [R, V] by the parameters' temperature, top_k and top_p.

    top_k keeps the k most probable tokens, and of equally probable ones the first. Then top_p keeps the most probable
    of these until they hold the share top_p of the mass that top_k kept.

    Temperature 0 gives the most probable token probability 1.
    """
    if params.temperature == 0:
        best = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
        return best.double()
    probs = (logits.double() / params.temperature).softmax(-1)
    if params.top_k > 0:
        probs = _keep(probs, lambda ordered: (torch.arange(ordered.shape[-1]) < params.top_k).expand_as(ordered))
    if params.top_p < 1:
        probs = _keep(probs, lambda ordered: ordered.cumsum(-1) - ordered <= params.top_p)
    return probs


def _keep(probs: torch.Tensor, wanted: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Renormalise over the tokens for which `wanted`, given each row in descending order, is true."""
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, wanted(ordered))
    probs = probs.masked_fill(~kept, 0)
    return probs / probs.sum(-1, keepdim=True)


def certain(logits: torch.Tensor, params: SamplingParams, odds: float = ODDS) -> torch.Tensor:
    """Return which tokens top_k and top_p keep [R, V], also if all odds were different by a factor of up to `odds`.

    Tokens that are at least 1 / odds times as probable as a token may come before it. If even all of these do, there
    must be fewer than top_k of them, and the share of the mass that they may then have must not exceed top_p.
    """
    if params.temperature == 0 or (params.top_k <= 0 and params.top_p >= 1):
        return torch.ones_like(logits, dtype=torch.bool)
    ordered, order = (logits.double() / params.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    before = torch.searchsorted(-ordered, -ordered / odds, right=True) - 1  # the token itself is not before it
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        kept = before < params.top_k
        ordered = ordered.masked_fill(torch.arange(ordered.shape[-1]) >= params.top_k, 0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if params.top_p < 1:
        share = ordered.cumsum(-1).gather(-1, before) - ordered
        kept &= odds * share / (1 + (odds - 1) * share) <= params.top_p
    return torch.zeros_like(kept).scatter_(-1, order, kept)
