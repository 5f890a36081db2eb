"""Trackers: they receive the metrics of every step. `telemetry.trackers` chooses them by name.

A new one is a class with the methods of `Tracker`, in a file of its own, and one line in TRACKERS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.registry import Registry

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Takes the metrics of a run's steps. Only the first rank has trackers, made as `NAME(folder, config)`.

    `folder` is the run's folder. It exists, and in a resumed run it holds the files of the earlier part. A resumed run
    makes its trackers before it knows at which step it continues. The first call of `log` shows that step, and a
    tracker then removes its records of that step and later ones.
    """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take one step's metrics, by name: each a number, or a list of numbers (one a draft depth, from 1).

        Steps count from 0 and rise by 1. The metrics must be written or sent when this returns: a run may be killed.
        """

    def close(self) -> None:
        """Finish: no step follows. Not called if the run ends with an error."""


class JsonlTracker:
    """metrics.jsonl: one object a step, with its number under "step". Resuming a run removes later lines."""

    def __init__(self, folder: Path, config: Config):
        self._file = (folder / METRICS).open("a")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """Events in the folder tensorboard/: a scalar for each number; a list becomes NAME_1, NAME_2, ..."""

    def __init__(self, folder: Path, config: Config):
        self.folder = folder / "tensorboard"
        self._writer = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Hides the events that an interrupted run wrote for steps that are done again.
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in metrics.items():
            if isinstance(value, list):
                for depth, item in enumerate(value, 1):
                    self._writer.add_scalar(f"{name}_{depth}", item, step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS: Registry[Callable[[Path, Config], Tracker]] = Registry("telemetry.trackers")
TRACKERS.add("jsonl", JsonlTracker)
TRACKERS.add("tensorboard", TensorBoardTracker)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown name, one given twice, or a list without jsonl."""
    given = f"{TRACKERS.key}=[{', '.join(names)}]"
    for name in names:
        TRACKERS[name]
        if names.count(name) > 1:
            raise ConfigError(f"{given}: {name} is given twice, and would record every step twice; give it once")
    if "jsonl" not in names:
        raise ConfigError(
            f"{given} has no jsonl: resuming a run, its summary and its page read {METRICS}; add jsonl to the list"
        )


def start_trackers(folder: Path, config: Config) -> list[Tracker]:
    """Make the trackers that the configuration names, in its order. Raises ConfigError as `check_trackers` does."""
    check_trackers(config.telemetry.trackers)
    return [TRACKERS[name](folder, config) for name in config.telemetry.trackers]
