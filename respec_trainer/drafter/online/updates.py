"""DrafterUpdates: the drafter's optimizer, data parallel over all trainer ranks, one collective an update.

One flat tensor holds the gradients, followed by the sums of the loss, and one all-reduce adds it up over ranks. A NaN
on one rank so reaches all of them, and none applies the update. Every rank starts from the same weights and applies the
same sums, so weights stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.distill import DistillSettings, drafter_optimizers
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.loss import DepthSums, distill_loss
from respec_trainer.drafter.muon import Muon
from respec_trainer.drafter.online.stored import Row
from respec_trainer.drafter.teacher import TeacherOutput
from respec_trainer.drafter.temperature import AtTemperature

CHUNK = 1024  # largest number of tokens whose draft logits are in memory at one time
PARTS = [part.name for part in fields(DepthSums)]  # in the order of a flat tensor
Micro = tuple[DrafterBatch, TeacherOutput]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one update, over all ranks."""

    applied: bool  # False: a gradient was not finite, or there were no tokens to learn from
    finite: bool
    loss: float
    whole: bool  # False: the ranks stopped before its last micro-batch


class DrafterUpdates:
    """Trains `drafter` in place. Its parameters must be float32. Every rank calls `step` equally often."""

    def __init__(self, drafter: Eagle3Drafter, config: DrafterConfig, temperature: float, bf16: bool = False):
        self.drafter, self.config, self.temperature, self.bf16 = drafter, config, temperature, bf16
        settings = DistillSettings(lr=config.lr, matrix_lr=config.matrix_lr, weight_decay=config.weight_decay)
        self.optimizers = drafter_optimizers(drafter, settings)
        warmup = config.warmup_updates
        self.schedules = [LambdaLR(o, lambda done: min((done + 1) / max(warmup, 1), 1.0)) for o in self.optimizers]
        self.parameters = list(drafter.parameters())
        self.device = self.parameters[0].device
        self.size = sum(parameter.numel() for parameter in self.parameters)
        # gradients, weight at the first depth, loss, then DepthSums
        self.flat = torch.zeros(self.size + 2 + len(PARTS) * config.unroll, device=self.device)
        self.totals = torch.ones(config.unroll, device=self.device)  # of the update being made
        self._tie_gradients()

    @property
    def nbytes(self) -> int:
        """Bytes of gradients and moments in float32: two moments of AdamW, one of Muon. Counted before they exist."""
        moments = 0
        for optimizer in self.optimizers:
            count = 1 if isinstance(optimizer, Muon) else 2
            moments += count * sum(weight.nbytes for group in optimizer.param_groups for weight in group["params"])
        return self.flat.nbytes + moments

    def _tie_gradients(self) -> None:
        parts = self.flat[: self.size].split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def step(
        self, micros: Sequence[Callable[[], Micro | None]], totals: Sequence[float], may_go_on: Callable[[], bool]
    ) -> Outcome:
        """Make one optimizer update from all ranks' micro-batches.

        The loss is `distill_loss` of all their rows together, however they are divided. If a rank runs out of memory,
        all ranks drop the update.

        Args:
            micros: functions that each make one micro-batch, or None if the rank has no rows for it; equally many on
                every rank.
            totals: the `drafted_weights` of the rows of all micro-batches of all ranks, by depth.
            may_go_on: called before each micro-batch; returns the same on every rank. At False the update is made from
                the micro-batches so far, as if the others had been like them.
        """
        self.flat.zero_()
        self.totals = torch.tensor(totals, dtype=torch.float32, device=self.device)
        whole = True
        for make in micros:
            whole = may_go_on()
            if not whole:
                break
            try:
                self._accumulate(make())
            except torch.OutOfMemoryError:
                self.flat[self.size] = torch.nan
        if dist.is_initialized():
            dist.all_reduce(self.flat)
        weight, loss = self.flat[self.size : self.size + 2].tolist()
        finite = bool(self.flat.isfinite().all())
        applied = finite and weight > 0
        share = weight / totals[0] if weight else 1.0  # of the rows; below 1 if the update was cut short
        if applied:
            self._apply(share)
        return Outcome(applied, finite, loss / share, whole)

    def sums(self) -> DepthSums:
        """The sums of the latest update's rows over all ranks, computed with the weights before the update."""
        return DepthSums(*self.flat[self.size + 2 :].view(len(PARTS), -1).clone())

    def _accumulate(self, micro: Micro | None) -> None:
        if micro is None:
            return
        batch, teacher = micro
        loss, sums = drafter_loss(self.drafter, batch, teacher, self.config, self.temperature, self.bf16, self.totals)
        weight = sums.weight[0]
        if weight == 0:  # no response is long enough to draft for
            return
        loss.backward()
        tail = self.flat[self.size :]
        tail[0] += weight
        tail[1] += loss.detach()
        tail[2:] += torch.stack([getattr(sums, part).float() for part in PARTS]).flatten()

    def _apply(self, share: float) -> None:
        self.flat[: self.size] /= share
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        for stepper in (*self.optimizers, *self.schedules):
            stepper.step()

    def state_dict(self) -> dict:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.last_epoch for schedule in self.schedules],
        }

    def load_state_dict(self, state: dict) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, done in zip(self.schedules, state["schedules"], strict=True):
            schedule.last_epoch = done


def batches(rows: Sequence[Row], size: int, count: int) -> list[list[Row]]:
    """Divide a rank's rows into those of `count` updates, `size` each: every row once, none where they are used up.

    The rows of an update are ordered by step, so that a micro-batch has few snapshots.
    """
    parts = [rows[start : start + size] for start in range(0, count * size, size)]
    return [sorted(part, key=lambda row: row.step) for part in parts]


def drafter_loss(
    drafter: Eagle3Drafter,
    batch: DrafterBatch,
    teacher: TeacherOutput,
    config: DrafterConfig,
    temperature: float,
    bf16: bool = False,
    totals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DepthSums]:
    """Compute `distill_loss` with the run's settings, at the sampling temperature."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=bf16):
        at = AtTemperature(drafter, temperature)
        return distill_loss(at, batch, teacher, config.unroll, config.decay, CHUNK, config.loss, totals)
