"""Supervisor: starts a run's launcher, and again when it fails; checkpoints make that go on, not begin anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from respec_trainer.processes import descendants, kill, parent_death_signal

CONFIGURATION = 2  # exit code of launch/train.py for what starting again would not mend
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RestartLimits:
    """How often to start again.

    max_restarts: within any `window` seconds; one more failure is the end.
    backoff: seconds before the first restart, doubled with each that follows, up to `most_backoff`.
    grace: seconds that the launcher gets to end its processes, once told to.
    """

    max_restarts: int = 3
    window: float = 3600.0
    backoff: float = 10.0
    most_backoff: float = 300.0
    grace: float = 60.0


class Supervisor:
    """Runs one command at a time, in a process group of its own. Signals are passed on, and then end it all."""

    def __init__(self, command: Sequence[str], limits: RestartLimits, say: Callable[[str], None] | None = None):
        self.command, self.limits = list(command), limits
        self.say = say or (lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True))
        self.received: int | None = None  # the signal that asked for the end

    def run(self) -> int:
        """Exit code of the last life of the command: 0, or why it is not started again. For a signal 128 + its number.

        Raises OSError where the command cannot be started at all.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)
        restarts: list[float] = []
        while True:
            code = self._live()
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
            self.say(f"exit code {code}; restart {len(restarts)} of {self.limits.max_restarts}")

    def _is_last(self, code: int, restarts: int) -> bool:
        if code == CONFIGURATION:
            self.say("the configuration was refused: not started again")
            return True
        if restarts >= self.limits.max_restarts:
            self.say(
                f"exit code {code} after {restarts} restarts within {self.limits.window:.0f} s (--max_restarts, "
                "--window): not started again"
            )
            return True
        return False

    def _backoff(self, restarts: int) -> float:
        return min(self.limits.backoff * 2**restarts, self.limits.most_backoff)

    def _live(self) -> int:
        """One life of the command; what it leaves behind is killed. Negative: the signal that ended it."""
        tied = parent_death_signal(signal.SIGTERM, os.getpid())
        process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=tied)  # noqa: PLW1509
        family = {psutil.Process(process.pid)}
        until: float | None = None
        while process.poll() is None:
            family |= set(descendants(process.pid))
            time.sleep(POLL_SECONDS)
            if self.received is not None and until is None:
                self.say(f"signal {self.received}: ending the run")
                process.send_signal(signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)
                until = time.monotonic() + self.limits.grace
            if until is not None and time.monotonic() > until:
                break
        kill(family)  # also those whose own parents are gone
        return process.wait()

    def _receive(self, number: int, frame: object) -> None:
        self.received = number

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.received is None and time.monotonic() < until:
            time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
