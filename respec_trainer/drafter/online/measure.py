"""Measure a drafter on new rollouts: its acceptance by depth, and the accept length that an engine should reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from respec_trainer.config import Config
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.loss import DepthSums, predicted_accept_length
from respec_trainer.drafter.online.recall import recall
from respec_trainer.drafter.online.stored import Row
from respec_trainer.drafter.online.updates import PARTS, drafter_loss
from respec_trainer.drafter.walk import pass_tokens


@dataclass
class Measurement:
    """Sums that add up over micro-batches and ranks."""

    depths: DepthSums
    passes: float  # verify passes that the engine took
    gained: float  # tokens that they yielded

    def flat(self) -> torch.Tensor:
        """All sums in one float64 tensor on the CPU; `of_flat` is the inverse."""
        parts = [getattr(self.depths, part).cpu().double() for part in PARTS]
        return torch.cat([*parts, torch.tensor([self.passes, self.gained], dtype=torch.float64)])

    @classmethod
    def of_flat(cls, flat: torch.Tensor) -> Measurement:
        return cls(DepthSums(*flat[:-2].view(len(PARTS), -1)), *flat[-2:].tolist())

    @classmethod
    def none(cls, unroll: int) -> Measurement:
        return cls.of_flat(torch.zeros(len(PARTS) * unroll + 2, dtype=torch.float64))

    def metrics(self, config: Config) -> dict[str, float | list[float]]:
        """The `drafter/*` metrics of this measurement; empty if no token was drafted.

        `predicted_accept_length` is counted along these responses for chains of `speculation.steps` drafts, each the
        drafter's first choice (walk.py). Under rejection sampling drafts are drawn, so it is computed from acceptance
        by depth instead; for trees it is left out. `measured_accept_length` is the engine's on the same responses:
        tokens that they kept a verify pass, as `spec/accept_length` counts them.
        """
        if not self.depths.tokens.any():
            return {}
        means, speculation = self.depths.means(), config.speculation
        found = {"drafter/acceptance": means["alpha"], "drafter/top1": means["top1"]}
        if speculation.rejection_sampling:
            found["drafter/predicted_accept_length"] = predicted_accept_length(means["alpha"], speculation.steps)
        elif speculation.topk == 1:
            found["drafter/predicted_accept_length"] = means["accept_length"][speculation.steps - 1]
        if self.passes:
            found["drafter/measured_accept_length"] = self.gained / self.passes
        return found


@torch.no_grad()
def measure(
    drafter: Eagle3Drafter, draft_ids: torch.Tensor, rows: Sequence[Row], config: Config, device: torch.device
) -> Measurement:
    """Measure `drafter`, which has draft vocabulary `draft_ids` [Vd], on this rank's rows."""
    total = Measurement.none(config.drafter.unroll).flat()
    temperature, size = config.rollout.sampling.temperature, config.drafter.micro_batch_size
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch, teacher = recall(some, temperature, device, draft_ids.to(device))
        _, depths = drafter_loss(drafter, batch, teacher, config.drafter, temperature)
        gained = pass_tokens(batch.response_mask).sum().item()
        total += Measurement(depths, sum(row.passes for row in some), gained).flat()
    return Measurement.of_flat(total)
