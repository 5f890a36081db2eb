"""Rows of the replay buffer as one batch on the device: the rollouts, and the teacher outputs of the actor.

Serving verifies against the target at the sampling temperature T, softmax(z / T), and under rejection sampling it draws
drafts from softmax(d / T). So both distributions are taken at T: `recall` returns z / T, and `AtTemperature`
(temperature.py) divides the drafter's logits d by T. A drafter distilled at T = 1 stays correct, because d = z fits at
any temperature. Top-k and top-p of the sampling are left out: they remove only tokens that are hardly ever drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch.nn.utils.rnn import pad_sequence

from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.online.stored import Row
from respec_trainer.drafter.teacher import TeacherOutput


def recall(
    rows: Sequence[Row], temperature: float, device: torch.device, draft_ids: torch.Tensor | None = None
) -> tuple[DrafterBatch, TeacherOutput]:
    """Return the rows [B, S], right-padded, and their TeacherOutput, with draft logits z / temperature.

    The logits are in the actor's dtype. With the draft vocabulary's `draft_ids` [Vd] the loss also counts verify passes
    along the responses (walk.py).
    """
    tokens = pad_sequence([row.tokens for row in rows], batch_first=True)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        mask[index, row.prompt : len(row.tokens)] = True
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
    teacher = TeacherOutput(
        features=_to(pad_sequence([row.features for row in rows], batch_first=True), device),
        embeddings=_to(pad_sequence([_embeddings(row) for row in rows], batch_first=True), device),
        draft_logits=_draft_logits(rows, temperature, device),
        logsumexp=_to(torch.cat([row.logsumexp for row in rows]), device),
        draft_ids=draft_ids,
    )
    return DrafterBatch(tokens, mask, weights).to(device), teacher


def _embeddings(row: Row) -> torch.Tensor:
    snapshot = row.snapshot
    return snapshot.embeddings[torch.searchsorted(snapshot.token_ids, row.tokens)]


def _draft_logits(rows: Sequence[Row], temperature: float, device: torch.device) -> torch.Tensor:
    parts = []
    for snapshot, group in groupby(rows, key=lambda row: row.snapshot):
        hidden = _to(torch.cat([row.hidden for row in group]), device)
        parts.append(hidden @ _to(snapshot.output_rows, device).t() / temperature)
    return torch.cat(parts)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; to a GPU through pinned memory, without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
