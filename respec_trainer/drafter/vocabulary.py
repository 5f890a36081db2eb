"""The draft vocabulary: the target's most frequent response tokens, and the maps between the two numberings.

A draft id is an index into `ids` [Vd], the draft vocabulary's target ids in ascending order.
"""

from __future__ import annotations

import torch

from respec_trainer.drafter.shape import VOCABULARY_MULTIPLE
from respec_trainer.errors import ConfigError

# Tensors of a drafter's folder that are not learned: the vocabulary's maps, and the target's embedding.
FIXED = ("d2t", "t2d", "embed_tokens.weight")
LEAST_COVERAGE = 0.9  # of response tokens by the draft vocabulary: of less the user is told, the rest is never drafted


def draft_vocabulary(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` most frequent target ids, ascending, [size] int64; of equally frequent ones the lowest.

    `counts` [V] says how often each token occurred in responses. Raises ConfigError unless `size` is a multiple of 64
    and at most V.
    """
    if size <= 0 or size % VOCABULARY_MULTIPLE or size > len(counts):
        largest = len(counts) // VOCABULARY_MULTIPLE * VOCABULARY_MULTIPLE
        raise ConfigError(
            f"a draft vocabulary of {size} tokens cannot be served: choose a multiple of {VOCABULARY_MULTIPLE}, at "
            f"most {largest} for this target's {len(counts)} tokens"
        )
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(counts: torch.Tensor, ids: torch.Tensor) -> float:
    """Share of the counted tokens that the draft vocabulary `ids` holds; 1.0 where nothing was counted."""
    total = counts.sum().item()
    return counts[ids].sum().item() / total if total else 1.0


def d2t(ids: torch.Tensor) -> torch.Tensor:
    """SGLang's draft-to-target map [Vd]: a DIFFERENCE, target id = draft id + d2t[draft id]."""
    return ids - torch.arange(len(ids), device=ids.device)


def t2d(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which target ids the draft vocabulary holds, [V] bool."""
    held = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
    held[ids] = True
    return held


def ids_from_d2t(difference: torch.Tensor) -> torch.Tensor:
    """The inverse of `d2t`."""
    return difference + torch.arange(len(difference), device=difference.device)
