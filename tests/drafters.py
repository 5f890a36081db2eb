"""Tiny drafters and rollouts, for tests."""

from __future__ import annotations

import torch

from respec_trainer.drafter.eagle3 import DrafterShape, Eagle3Drafter
from respec_trainer.drafter.rollouts import Rollouts
from tests.models import tiny_config

DRAFT_IDS = torch.arange(64) * 2 + 1  # of the tiny models' 131 tokens


def target_config(family="qwen3", layers: int = 4, **changes):
    return tiny_config(family, layers=layers, **changes)


def tiny_drafter(hf_config=None, seed: int = 0, draft_vocab_size: int = 64) -> Eagle3Drafter:
    """A random drafter whose norms are not at one, so that a norm mixed up or left out shows."""
    drafter = Eagle3Drafter(DrafterShape.for_target(hf_config or target_config(), draft_vocab_size), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
    return drafter


def random_rollouts(lengths, vocab_size: int = 131, seed: int = 0) -> Rollouts:
    """One row for each (prompt length, response length), of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    return Rollouts.collate([(draw(prompt), draw(response)) for prompt, response in lengths])
