"""Report: all output of a run for its user, in one object. On ranks other than the first it only measures time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from respec_trainer.collectives import broadcast
from respec_trainer.config import Config
from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.algorithms import is_lossy
from respec_trainer.telemetry.live import Progress
from respec_trainer.telemetry.page import write_page
from respec_trainer.telemetry.phases import PhaseClock
from respec_trainer.telemetry.recorder import Recorder, new_run_folder, read_metrics
from respec_trainer.telemetry.summary import LOSSY, print_summary
from respec_trainer.telemetry.timeline import Timeline


class Report:
    """Owns the run's folder (its path is the same on every rank), the progress display and the clock of the phases."""

    def __init__(
        self,
        config: Config,
        rank: int,
        control: dist.ProcessGroup,
        folder: Callable[[Config], Path] = new_run_folder,
        enter: Callable[[int, str], None] | None = None,
    ):
        """Make the run's folder with `folder(config)` on the first rank; call `enter(step, phase)` for each phase.

        Steps count from 1 in `enter`.
        """
        self.first = rank == 0
        self.enter, self.done = enter, 0  # `done` counts steps
        self.folder = broadcast(folder(config).resolve() if self.first else None, group=control)
        self.steps: list[dict] = []
        self.recorder = Recorder(self.folder, config) if self.first else None
        self.progress = Progress(config.run.steps, config.telemetry.live if self.first else "off")
        self.progress.__enter__()
        self.clock = PhaseClock(self.phase)
        if is_lossy(config.speculation):
            self.notify(LOSSY)

    def phase(self, name: str) -> None:
        self.progress.phase(name)
        if self.enter:
            self.enter(self.done + 1, name)

    def notify(self, text: str) -> None:
        """Inform the user."""
        self.progress.notify(text)

    def loaded(self, prompts) -> None:
        """Report how many prompts there are, and how many were dropped for their length."""
        dropped = f"; {prompts.dropped} dropped: longer than {prompts.limit} tokens" if prompts.dropped else ""
        self.notify(f"{len(prompts)} prompts{dropped}")

    def resumed(self, done: int) -> None:
        """Continue a run after `done` steps, where its records end."""
        self.done = done
        if self.first:
            self.steps = read_metrics(self.folder)

    def samples(self, step: int, samples: Sequence[Sample], texts: Sequence[tuple[str, str]]) -> None:
        if self.recorder:
            self.recorder.samples(step, samples, texts)

    def rollout(self, step: int, samples: Sequence[Sample], timelines: Sequence[Timeline]) -> None:
        if self.recorder:
            self.recorder.rollout(step, samples, timelines)

    def step(self, step: int, metrics: dict) -> None:
        self.steps.append(metrics)
        self.done = step + 1
        self.progress.step(step, metrics)
        if self.recorder:
            self.recorder.step(step, metrics)

    def summary(self) -> None:
        self.progress.__exit__()
        if self.first:
            if self.steps:
                self._write_page()
            print_summary(self.steps, self.folder)

    def _write_page(self) -> None:
        """Write report.html. An error is only reported, because the run itself has ended well."""
        try:
            write_page(self.folder)
        except Exception as error:
            again = f"python tools/report.py {self.folder}"
            self.notify(f"report.html was not written ({type(error).__name__}: {error}); try again with {again}")

    def close(self) -> None:
        self.progress.__exit__()
        if self.recorder:
            self.recorder.close()
