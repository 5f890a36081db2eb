"""TeacherOutput, which a drafter learns from: the target's features, token embeddings and next-token distributions.

`distill` reads only TeacherOutput. HFTeacher computes it with transformers, for training before a run; in a run
online/recall.py computes it from the actor's stored hidden states and output weight. No tensor of size [tokens, V] is
kept for longer than a chunk.
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

CHUNK = 1024  # largest number of tokens whose logits over the whole vocabulary are in memory at one time


@dataclass(frozen=True)
class TeacherOutput:
    """The target's outputs on a batch [B, S] with M response tokens, counted row by row. None has a gradient."""

    features: torch.Tensor  # [B, S, 3H], the three feature layers' outputs, low to high
    embeddings: torch.Tensor  # [B, S, H], of the token at each position
    draft_logits: torch.Tensor  # [M, Vd], the target's logits for each response token, in the draft vocabulary
    logsumexp: torch.Tensor  # [M] float32, of the logits over the whole vocabulary; both at the sampling temperature
    draft_ids: torch.Tensor | None = None  # [Vd], the draft vocabulary; None: verify passes are not counted (walk.py)


class Teacher(Protocol):
    def __call__(self, batch: DrafterBatch) -> TeacherOutput: ...


class HFTeacher:
    """The model of a Hugging Face folder as a teacher.

    Args:
        folder: the actor's folder.
        draft_ids: the draft vocabulary, [Vd].
        feature_layers: 0-based layers whose outputs are the features; never the last.
        device: of the model and its outputs, which are float32.
        temperature: of the sampling that the drafter drafts for.

    Raises ValueError for feature layers that the model does not have, or the last one.
    """

    def __init__(
        self,
        folder: Path | str,
        draft_ids: torch.Tensor,
        feature_layers: Sequence[int],
        device: torch.device | str = "cpu",
        temperature: float = 1.0,
    ):
        define_torchvision_operators()
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.layers = self.model.get_submodule(family_of(self.model.config).names.layers)
        last = self.model.config.num_hidden_layers - 1
        if not all(0 <= layer < last for layer in feature_layers):
            raise ValueError(f"feature layers {list(feature_layers)} must be among layers 0 to {last - 1}")
        self.feature_layers = tuple(feature_layers)
        self.draft_ids, self.temperature = draft_ids.to(device), temperature

    @torch.no_grad()
    def __call__(self, batch: DrafterBatch) -> TeacherOutput:
        # Rows are right-padded and attention is causal, so no token attends to padding: no mask is needed.
        with LayerOutputs(self.layers, self.feature_layers) as outputs:
            hidden = self.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][batch.response_mask[:, 1:]]  # the position before a token predicts it
        output = self.model.get_output_embeddings().weight
        logits, logsumexp = draft_scores(rows, output, self.draft_ids, CHUNK, self.temperature)
        embeddings = self.model.get_input_embeddings()(batch.tokens)
        return TeacherOutput(torch.cat(outputs, -1), embeddings, logits, logsumexp, self.draft_ids)


def draft_scores(
    hidden: torch.Tensor, weight: torch.Tensor, draft_ids: torch.Tensor, chunk: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of the draft vocabulary [M, Vd], and log-sum-exps over the whole vocabulary [M] in float32.

    Both are of logits / temperature. `hidden` [M, H] is after the final norm, `weight` [V, H]. At most `chunk` x V
    logits are in memory at one time.
    """
    logits, sums = [], []
    for part in hidden.split(chunk):
        scores = part @ weight.t() / temperature
        logits.append(scores[:, draft_ids])
        sums.append(scores.float().logsumexp(-1))
    return torch.cat(logits), torch.cat(sums)
