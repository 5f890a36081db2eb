"""Recorder: writes the run's folder: config.yaml, samples.jsonl, and the trackers' files, such as metrics.jsonl.

Each step N = 1, 2, ... also has lengths/step_N.jsonl, a trace of its responses, and decode/step_N.npz, the engines'
decode batches, if they log them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from respec_trainer.config import Config
from respec_trainer.config_file import dump_config
from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.simulation.trace import save_trace
from respec_trainer.telemetry.timeline import Timeline, save_timelines
from respec_trainer.telemetry.traces import trace_rows
from respec_trainer.telemetry.trackers import METRICS, start_trackers


def new_run_folder(config: Config) -> Path:
    """Make and return `runs/NAME`, or `NAME-2`, `NAME-3`, ... if that exists: each run has a folder of its own."""
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
    """Writes a run's records. Only one process of the run has a Recorder."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.samples_per_step = folder, config.telemetry.samples_per_step
        self.group_size, self.kept = config.rollout.samples_per_prompt, config.telemetry.traces
        (folder / "config.yaml").write_text(dump_config(config))
        self.trackers = start_trackers(folder, config)
        self._samples = (folder / "samples.jsonl").open("a")

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass one step's metrics to every tracker."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

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
            record |= {"reward_parts": sample.reward_parts} if sample.reward_parts else {}
            record |= {"skipped": True} if sample.reward is None else {}
            self._samples.write(json.dumps(record) + "\n")
        self._samples.flush()

    def rollout(self, step: int, samples: Sequence[Sample], timelines: Sequence[Timeline]) -> None:
        """Write a step's trace, and its timelines if there are any; keep only the newest `telemetry.traces` steps."""
        rows = trace_rows(samples, self.group_size, timelines)
        self._keep(f"lengths/step_{step + 1}.jsonl", lambda path: save_trace(rows, path))
        if any(len(line.log) for line in timelines):
            self._keep(f"decode/step_{step + 1}.npz", lambda path: save_timelines(timelines, path))
        if self.kept and step >= self.kept:
            for old in (f"lengths/step_{step + 1 - self.kept}.jsonl", f"decode/step_{step + 1 - self.kept}.npz"):
                (self.folder / old).unlink(missing_ok=True)

    def _keep(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file under a temporary name, then rename it, so that a killed run leaves no incomplete file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        write(unfinished)
        unfinished.rename(path)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self._samples.close()


def timeline_files(folder: Path) -> dict[int, Path]:
    """The files of `save_timelines` in a run's folder: step, counted from 1, -> path, in the order of steps."""
    found = {int(path.stem.removeprefix("step_")): path for path in (folder / "decode").glob("step_*.npz")}
    return dict(sorted(found.items()))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, one dictionary a step."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
