"""How much each response token counts in the loss of a minibatch."""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig


def token_weights(mask: torch.Tensor, tokens: float, sequences: float, config: ObjectiveConfig) -> torch.Tensor:
    """Weight [B, S] float32 of each response token; the weights of a whole minibatch sum to 1.

    objective.aggregation "token" counts every token alike, 1 / tokens (DAPO, arXiv 2503.14476, section 3.3); "sequence"
    counts every response alike, 1 / (its length * sequences) (GRPO, arXiv 2402.03300, eq. 3).

    Args:
        mask: [B, S] bool, the response tokens of some rows of the minibatch.
        tokens, sequences: how many response tokens, and non-empty responses, the whole minibatch has over all
            data-parallel ranks, each at least 1. They make the loss independent of micro-batches and ranks.
    """
    if config.aggregation == "token":
        return mask / tokens
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * sequences)
