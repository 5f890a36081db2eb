"""The draft vocabulary: the target's most frequent response tokens, and the maps between draft ids and target ids.

A draft id is an index into `ids` [Vd], the draft vocabulary's target ids in ascending order.
"""

from __future__ import annotations

import torch

from respec_trainer.drafter.shape import VOCABULARY_MULTIPLE
from respec_trainer.errors import ConfigError

# Tensors of a drafter's folder that are not learned: the vocabulary's maps, and the target's embedding.
FIXED = ("d2t", "t2d", "embed_tokens.weight")
LEAST_COVERAGE = 0.9  # share of response tokens in the draft vocabulary, below which the user is warned


def draft_vocabulary(counts: torch.Tensor, size: int) -> torch.Tensor:
    """Return the `size` most frequent target ids, ascending, [size] int64. Of equally frequent ids the lower one wins.

    `counts` [V] holds how often each token occurred in responses. Raises ConfigError unless `size` is a multiple of 64
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
    """The share of the counted tokens that are in the draft vocabulary `ids`; 1.0 if no token was counted."""
    total = counts.sum().item()
    return counts[ids].sum().item() / total if total else 1.0


def d2t(ids: torch.Tensor) -> torch.Tensor:
    """SGLang's draft-to-target map [Vd]: a DIFFERENCE, target id = draft id + d2t[draft id]."""
    return ids - torch.arange(len(ids), device=ids.device)


def t2d(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """SGLang's mask of the draft vocabulary, [V] bool: True for target ids that it holds."""
    held = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
    held[ids] = True
    return held


def ids_from_d2t(difference: torch.Tensor) -> torch.Tensor:
    """The draft vocabulary `ids` [Vd] of a map `d2t(ids)`."""
    return difference + torch.arange(len(difference), device=difference.device)
