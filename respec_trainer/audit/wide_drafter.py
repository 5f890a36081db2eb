"""Extend a drafter's vocabulary to the whole one: rejection sampling needs the drafter's law over every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.format import load_drafter, save_drafter


def widen_drafter(folder: Path | str, hf_config, out: Path) -> Path:
    """Write the drafter in `folder` to `out` with an output row for every token, and return `out`.

    The added rows are zero, so their logits are 0. That is a poor draft law, but the accepted tokens follow the
    target's law for any draft law.
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
