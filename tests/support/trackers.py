"""MemoryTracker: a tracker as a user of the project would write it. Tests read the metrics that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from respec_trainer.config import Config


class MemoryTracker:
    """Keeps what it is given."""

    made: list[MemoryTracker] = []

    def __init__(self, folder: Path, config: Config):
        self.folder, self.run_name = folder, config.run.name
        self.steps: list[tuple[int, dict[str, Any]]] = []
        self.closed = False
        self.made.append(self)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.steps.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True
