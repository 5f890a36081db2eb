"""The law that a rollout engine must follow: the actor's next-token law after the sampling parameters are applied.

Shapes: R prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from respec_trainer.rollout.sample import SamplingParams


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
