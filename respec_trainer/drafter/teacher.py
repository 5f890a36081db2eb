"""What the drafter learns from: the target's features, token embeddings and next-token distributions.

`distill` knows only TeacherOutput. HFTeacher computes it with transformers, for training before a run; a live actor
can supply the same from hidden states it kept and its output weight. Nothing of size [tokens, V] outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from respec_trainer.capture import LayerOutputs
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.models.registry import family_of


@dataclass(frozen=True)
class TeacherOutput:
    """Of one batch [B, S] with M response tokens, counted row by row. No part carries a gradient."""

    features: torch.Tensor  # [B, S, 3H], the three feature layers' outputs, low to high
    embeddings: torch.Tensor  # [B, S, H], of the token at each position
    draft_logits: torch.Tensor  # [M, Vd], the target's logits for each response token, the draft vocabulary's columns
    logsumexp: torch.Tensor  # [M] float32, over the whole vocabulary
    draft_ids: torch.Tensor | None = None  # [Vd], the draft vocabulary; without it no walk is taken (walk.py)


class Teacher(Protocol):
    def __call__(self, batch: DrafterBatch) -> TeacherOutput: ...


class HFTeacher:
    """The model of a Hugging Face folder as a teacher, at temperature 1.

    Args:
        folder: the actor's folder.
        draft_ids: the draft vocabulary, [Vd].
        feature_layers: 0-based layers whose outputs are the features; never the last.
        dtype, device: of the model and all it gives.
        chunk: tokens whose logits over the whole vocabulary exist at one time.
    """

    def __init__(
        self,
        folder: Path | str,
        draft_ids: torch.Tensor,
        feature_layers: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk: int = 1024,
    ):
        define_torchvision_operators()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
        self.layers = self.model.get_submodule(family_of(self.model.config).names.layers)
        last = self.model.config.num_hidden_layers - 1
        if not all(0 <= layer < last for layer in feature_layers):
            raise ValueError(f"feature layers {list(feature_layers)} must be among layers 0 to {last - 1}")
        self.feature_layers = tuple(feature_layers)
        self.draft_ids, self.chunk = draft_ids.to(device), chunk

    @torch.no_grad()
    def __call__(self, batch: DrafterBatch) -> TeacherOutput:
        # Rows are right-padded and attention is causal, so no position that counts sees padding: no mask is needed.
        with LayerOutputs(self.layers, self.feature_layers) as outputs:
            hidden = self.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][batch.response_mask[:, 1:]]  # what stands before a token predicts it
        logits, logsumexp = draft_scores(rows, self.model.get_output_embeddings().weight, self.draft_ids, self.chunk)
        embeddings = self.model.get_input_embeddings()(batch.tokens)
        return TeacherOutput(torch.cat(outputs, -1), embeddings, logits, logsumexp, self.draft_ids)


def draft_scores(
    hidden: torch.Tensor, weight: torch.Tensor, draft_ids: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the draft vocabulary [M, Vd], and log-sum-exps over the whole one [M] in float32.

    `hidden` [M, H] after the final norm, `weight` [V, H]; at most `chunk` x V logits exist at one time.
    """
    logits, sums = [], []
    for part in hidden.split(chunk):
        scores = part @ weight.t()
        logits.append(scores[:, draft_ids])
        sums.append(scores.float().logsumexp(-1))
    return torch.cat(logits), torch.cat(sums)
