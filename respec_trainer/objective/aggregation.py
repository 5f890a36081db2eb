"""The weight of each response token in the loss of a minibatch."""

from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig


def token_weights(mask: torch.Tensor, tokens: float, sequences: float, config: ObjectiveConfig) -> torch.Tensor:
    """The weight [B, S] float32 of each response token; the weights of a whole minibatch sum to 1.

    objective.aggregation "token" gives every token the same weight, 1 / tokens (DAPO, arXiv 2503.14476, section 3.3);
    "sequence" gives every response the same weight, so a token 1 / (response length * sequences) (GRPO, arXiv
    2402.03300, eq. 3).

    Args:
        mask: [B, S] bool, the response tokens of some rows of the minibatch.
        tokens, sequences: the numbers of response tokens and of non-empty responses in the whole minibatch, over all
            data-parallel ranks, each at least 1. Because of them the loss does not depend on the split into
            micro-batches and ranks.
    """
    if config.aggregation == "token":
        return mask / tokens
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * sequences)
