"""Supervised learning of a small model: Muon for the layers' matrices, AdamW for the rest, bf16 where it is fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from respec_trainer.compat.precision import bf16_is_quick
from respec_trainer.drafter.muon import Muon
from respec_trainer.recipes.lessons import IGNORED

CLIP = 1.0


def train_supervised(model: nn.Module, batches: Iterable, teaching, notify: Callable[[str], None]) -> float:
    """Minimize next-token cross-entropy over `batches` of (ids [B, S], targets [B, S]); return the last reported loss.

    `teaching` is the recipe's section; `notify` informs the user. The loss of a batch is its sum over targets divided
    by a constant, not by its number of targets, so that a token has the same weight in a batch of short answers as in
    one of long answers.
    """
    optimizers = setup_optimizers(model, teaching.lr, teaching.matrix_lr)
    schedules = [LambdaLR(optimizer, lambda step: rate(step, teaching)) for optimizer in optimizers]
    began, total, count, average = time.perf_counter(), 0.0, 0, float("nan")
    model.train()
    scale = None
    for step, (ids, targets) in zip(range(1, teaching.steps + 1), batches, strict=False):
        loss, tokens = summed_loss(model, ids, targets)
        scale = scale or tokens
        (loss / scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        total, count = total + loss.item(), count + tokens
        if step % 100 == 0 or step == teaching.steps:
            average, total, count = total / count, 0.0, 0
            notify(f"step {step}/{teaching.steps}  loss {average:.3f}  {time.perf_counter() - began:.0f} s")
    return average


def summed_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Return the cross-entropy summed over the targets that are not ignored, and the number of those targets."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_quick()):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = targets[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
    return loss, int((wanted != IGNORED).sum())


def setup_optimizers(model: nn.Module, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the layers, and AdamW for embeddings, norms and the output layer."""
    layers = {id(weight) for weight in model.model.layers.parameters() if weight.ndim == 2}
    matrices = [weight for weight in model.parameters() if id(weight) in layers]
    others = [weight for weight in model.parameters() if id(weight) not in layers]
    return [
        Muon(matrices, matrix_lr, weight_decay=0.01, momentum=0.95),
        AdamW(others, lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def rate(step: int, teaching) -> float:
    """Learning-rate factor of a step: linear warm-up, constant, linear decay to zero over the last `decay` share."""
    warm = (step + 1) / max(1, teaching.warmup_steps)
    left = (teaching.steps - step) / max(1.0, teaching.decay * teaching.steps)
    return max(0.0, min(1.0, warm, left))
