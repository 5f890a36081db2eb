"""Distillation: train a drafter on rollouts, and measure how well it drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.divergence import LossKind
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.loss import DepthSums, distill_loss
from respec_trainer.drafter.muon import Muon
from respec_trainer.drafter.teacher import Teacher
from respec_trainer.drafter.temperature import AtTemperature
from respec_trainer.errors import TrainingError


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a drafter's training. The learning rate rises linearly, then falls to zero along a cosine."""

    updates: int = 300
    batch_size: int = 32  # rows
    by_length: bool = True  # True: rows of similar length in a batch; False: batches are fair samples of all rows
    steps: int = 5  # K: unrolled draft steps; at least as many as the engine will draft
    loss: LossKind = "kl"  # divergence.py
    decay: float = 0.8  # factor from one step's weight in the loss to the next one's
    lr: float = 2e-3  # AdamW
    matrix_lr: float | None = None  # Muon for all matrices but the output layer's; None: AdamW for everything
    warmup: float = 0.1  # share of the updates
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm
    chunk: int = 1024  # largest number of tokens whose draft logits are in memory at one time
    bf16: bool = False  # multiply matrices in bf16, in teacher and drafter; weights and updates keep their dtype
    temperature: float = 1.0  # of the sampling that the drafter drafts for: divides its logits; the teacher has its own
    seed: int = 0  # decides the order of batches


@dataclass(frozen=True)
class Evaluation:
    """Means per depth over all drafted tokens: the loss, and the two acceptances that loss.py defines.

    `accept_length[s - 1]` is the number of tokens a verify pass with chains of s drafts, the bonus token included,
    under the engine's default verification. It is counted along the recorded responses (walk.py).
    """

    loss: list[float]
    alpha: list[float]
    top1: list[float]
    accept_length: list[float]


def distill(
    drafter: Eagle3Drafter,
    teacher: Teacher,
    rollouts: DrafterBatch,
    settings: DistillSettings,
    progress: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train `drafter` in place, in the dtype of its parameters. Use float32: smaller types lose small updates.

    Returns one record an update: "update", "loss", "grad_norm", "lr", and "alpha" and "top1" per depth; `progress` is
    called with each record. The same seed, drafter and rollouts give the same result. Raises TrainingError if a loss or
    gradient is not finite, before the weights change.
    """
    device = drafter.fc.weight.device
    optimizers = drafter_optimizers(drafter, settings)
    schedules = [LambdaLR(optimizer, lambda done: _lr_factor(done, settings)) for optimizer in optimizers]
    history = []
    for update, batch in zip(range(settings.updates), _endless(rollouts, settings), strict=False):
        loss, sums = _loss(drafter, teacher, batch.to(device), settings)
        drafter.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(drafter.parameters(), settings.clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"drafter update {update + 1}: loss {loss.item()}, gradient norm {norm.item()}; lower lr"
            )
        rate = schedules[0].get_last_lr()[0]
        record = {"update": update + 1, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
        for stepper in (*optimizers, *schedules):
            stepper.step()
        means = sums.means()
        history.append(record | {"alpha": means["alpha"], "top1": means["top1"]})
        if progress:
            progress(history[-1])
    return history


@torch.no_grad()
def evaluate(drafter: Eagle3Drafter, teacher: Teacher, rollouts: DrafterBatch, settings: DistillSettings) -> Evaluation:
    """Measure how well `drafter` drafts for `rollouts`, preferably ones that it was not trained on.

    Raises ValueError if there are none.
    """
    device = drafter.fc.weight.device
    total: DepthSums | None = None
    for batch in rollouts.batches(settings.batch_size, torch.Generator().manual_seed(settings.seed)):
        _, sums = _loss(drafter, teacher, batch.to(device), settings)
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("no rollouts to evaluate on")
    return Evaluation(**total.means())


def _loss(drafter, teacher: Teacher, batch: DrafterBatch, settings: DistillSettings) -> tuple[torch.Tensor, DepthSums]:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=settings.bf16):
        at, target = AtTemperature(drafter, settings.temperature), teacher(batch)
        return distill_loss(at, batch, target, settings.steps, settings.decay, settings.chunk, settings.loss)


def drafter_optimizers(drafter: Eagle3Drafter, settings: DistillSettings) -> list[torch.optim.Optimizer]:
    """Make AdamW and, if `matrix_lr` is set, Muon for the matrices other than the output layer."""
    inner = {}
    if settings.matrix_lr is not None:
        matrices = [w for name, w in drafter.named_parameters() if w.ndim == 2 and "lm_head" not in name]
        inner = {id(weight): weight for weight in matrices}
    others = [weight for weight in drafter.parameters() if id(weight) not in inner]
    adamw = AdamW(others, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    if not inner:
        return [adamw]
    return [adamw, Muon(inner.values(), settings.matrix_lr, momentum=0.95, weight_decay=settings.weight_decay)]


def _endless(rollouts: DrafterBatch, settings: DistillSettings) -> Iterator[DrafterBatch]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from rollouts.batches(settings.batch_size, generator, settings.by_length)


def _lr_factor(done: int, settings: DistillSettings) -> float:
    """The factor of `lr` for update number `done`, counted from 0."""
    warmup = max(int(settings.updates * settings.warmup), 1)
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(settings.updates - warmup, 1)))
