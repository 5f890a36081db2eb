"""AtTemperature: a drafter as it drafts at a sampling temperature."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from respec_trainer.drafter.eagle3 import Eagle3Drafter


class AtTemperature:
    """A drafter whose logits are divided by the sampling temperature, with the two methods that losses use."""

    def __init__(self, drafter: Eagle3Drafter, temperature: float):
        self.drafter, self.temperature = drafter, temperature

    def unroll(self, embeddings: torch.Tensor, features: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
        return self.drafter.unroll(embeddings, features, steps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.drafter.logits(hidden) / self.temperature
