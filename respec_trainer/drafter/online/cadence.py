"""Cadence: the choice of the iterations in which the drafter trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass
class Cadence:
    """Decides before each generation phase whether to train. Call `note` with each step's accept length and seconds.

    "interval": train every `interval` iterations (on 1 / interval of the buffer, as in the paper).

    "need": train when the accept length a has fallen by `delta` from b, its best since the last training, and training
    saves time. A generation phase of G seconds at accept length a takes G a / b at b, so each step saves (1 - a / b) G.
    We assume that the drafter will stay good for as many steps as passed since the last training. The saving over that
    many steps must exceed the seconds of the last training (0 before the first).
    """

    kind: Literal["interval", "need"]
    interval: int = 1
    delta: float = 0.1
    since: int = 0  # iterations since the last training
    best: float = 0.0
    latest: float = 0.0
    generation: float = 0.0  # seconds of the latest phase
    training: float = 0.0  # seconds of the last training

    def note(self, accept_length: float, generation_seconds: float) -> None:
        self.since += 1
        self.best = max(self.best, accept_length)
        self.latest, self.generation = accept_length, generation_seconds

    def due(self) -> bool:
        if self.kind == "interval":
            return self.since >= self.interval
        fallen = self.best - self.latest
        return self.since > 0 and fallen >= self.delta and self.saving() > self.training

    def saving(self) -> float:
        """Predict the seconds that a drafter as good as the best one saves until the next training."""
        return (1 - self.latest / self.best) * self.generation * self.since if self.best else 0.0

    def trained(self, seconds: float) -> None:
        self.since, self.best, self.training = 0, 0.0, seconds

    @property
    def share(self) -> float:
        """The share of the buffer that one training goes through."""
        return 1 / self.interval if self.kind == "interval" else 1.0

    def state_dict(self) -> dict:
        return {name: asdict(self)[name] for name in ("since", "best", "latest", "generation", "training")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
