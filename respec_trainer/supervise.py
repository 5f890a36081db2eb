"""Supervisor: starts a run's launcher, and starts it again when it fails; the run resumes from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from respec_trainer.processes import descendants, kill, parent_death_signal

CONFIGURATION = 2  # exit code of launch/train.py for errors that a restart cannot fix
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RestartLimits:
    """Limits of the restarts of a failed command.

    max_restarts: restarts within any `window` seconds; after one more failure the supervisor ends.
    backoff: seconds before the first restart, doubled for each later one, up to `most_backoff`.
    grace: seconds that the launcher has to end its processes after a signal.
    """

    max_restarts: int = 3
    window: float = 3600.0
    backoff: float = 10.0
    most_backoff: float = 300.0
    grace: float = 60.0


class Supervisor:
    """Runs one command at a time, in its own process group. A signal is passed on to the command, and ends both."""

    def __init__(self, command: Sequence[str], limits: RestartLimits):
        self.command, self.limits = list(command), limits
        self.received: int | None = None  # the signal that ends the supervisor

    def run(self) -> int:
        """Run the command until it succeeds or is not started again. Return its last exit code; 128 + N after signal N.

        Raises OSError if the command cannot be started at all.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)
        restarts: list[float] = []
        while True:
            code = self._run_once()
            if self.received is not None:
                return 128 + self.received
            now = time.monotonic()
            restarts = [moment for moment in restarts if now - moment < self.limits.window]
            if code == 0 or self._is_last(code, len(restarts)):
                return code
            self._wait(self._backoff(len(restarts)))
            if self.received is not None:
                return 128 + self.received
            restarts.append(now)
            self.notify(f"exit code {code}; restart {len(restarts)} of {self.limits.max_restarts}")

    def notify(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)

    def _is_last(self, code: int, restarts: int) -> bool:
        if code == CONFIGURATION:
            self.notify("the configuration was refused: not started again")
            return True
        if restarts >= self.limits.max_restarts:
            self.notify(
                f"exit code {code} after {restarts} restarts within {self.limits.window:.0f} s (--max_restarts, "
                "--window): not started again"
            )
            return True
        return False

    def _backoff(self, restarts: int) -> float:
        return min(self.limits.backoff * 2**restarts, self.limits.most_backoff)

    def _run_once(self) -> int:
        """Run the command once, then kill all its processes. Return its exit code; -N: ended by signal N."""
        tied = parent_death_signal(signal.SIGTERM, os.getpid())
        process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=tied)  # noqa: PLW1509
        family = {psutil.Process(process.pid)}
        until: float | None = None
        while process.poll() is None:
            family |= set(descendants(process.pid))
            time.sleep(POLL_SECONDS)
            if self.received is not None and until is None:
                self.notify(f"signal {self.received}: ending the run")
                process.send_signal(signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)
                until = time.monotonic() + self.limits.grace
            if until is not None and time.monotonic() > until:
                break
        kill(family)  # also processes whose own parents are gone
        return process.wait()

    def _receive(self, number: int, frame: object) -> None:
        self.received = number

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.received is None and time.monotonic() < until:
            time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
