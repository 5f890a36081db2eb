"""A drafter of the whole vocabulary, made of one of a part of it: rejection sampling needs its law over every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.format import load_drafter, save_drafter


def widen_drafter(folder: Path | str, hf_config, out: Path) -> Path:
    """Write to `out` the drafter in `folder` with a head for every token, and return `out`.

    The added tokens have zero rows, so their logits are 0: a poor guess, but any law may propose where what is accepted
    follows the target's.
    """
    drafter, ids = load_drafter(folder, hf_config, dtype=torch.float32)
    vocab = drafter.shape.vocab_size
    wide = Eagle3Drafter(replace(drafter.shape, draft_vocab_size=vocab))
    state = drafter.state_dict()
    head = torch.zeros(vocab, state["lm_head.weight"].shape[1])
    head[ids] = state["lm_head.weight"]
    wide.load_state_dict(state | {"lm_head.weight": head})
    save_drafter(wide, torch.arange(vocab), out, dtype=torch.float32)
    return out
