"""The run's folder: config.yaml, metrics.jsonl (one object a step), samples.jsonl, TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from respec_trainer.config import Config, dump_config
from respec_trainer.rollout.sample import Sample


def new_run_folder(config: Config) -> Path:
    """Make and return `runs/NAME`, or `NAME-2`, `NAME-3`, ... where that exists: a run never writes into another's."""
    base = Path(config.run.dir)
    number = 1
    while True:
        folder = base / (config.run.name if number == 1 else f"{config.run.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return folder


class Recorder:
    """Writes a run's records as they come. One process of the run has one."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.samples_per_step = folder, config.telemetry.samples_per_step
        (folder / "config.yaml").write_text(dump_config(config))
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._samples = (folder / "samples.jsonl").open("a")
        self._board = None
        if config.telemetry.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics; a list (a value by depth) becomes one TensorBoard scalar an entry."""
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        if self._board is None:
            return
        for name, value in metrics.items():
            if isinstance(value, list):
                for depth, item in enumerate(value, 1):
                    self._board.add_scalar(f"{name}_{depth}", item, step)
            else:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def samples(self, step: int, samples: Sequence[Sample], texts: Sequence[tuple[str, str]]) -> None:
        """Append the first few samples of a step, with (prompt, response) texts."""
        for sample, (prompt, response) in list(zip(samples, texts, strict=True))[: self.samples_per_step]:
            record = {
                "step": step,
                "key": sample.key,
                "prompt": prompt,
                "response": response,
                "reward": sample.reward,
                "finish_reason": sample.finish_reason,
                "actor_version": sample.actor_version,
                "drafter_version": sample.drafter_version,
                "accept_length": sample.accept_length,
            }
            self._samples.write(json.dumps(record) + "\n")
        self._samples.flush()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dictionary a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
