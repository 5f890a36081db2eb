"""Watchdog: every rank reports its state to the first rank once a second; the first rank judges all, the others it.

Beats and answers are UDP datagrams to the port of MASTER_PORT on the first rank's host: a dead host or a broken link
cannot block them, and no step waits for them. A thread does the work, also while the main thread waits in a collective
or hangs. The first rank sends a verdict to every rank with its answers; a rank that gets no answers any more reaches
its own verdict about the first rank. One rank on each host prints the verdict, and every rank ends, its children first.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from respec_trainer.config import RunConfig
from respec_trainer.errors import ConfigError
from respec_trainer.interrupt import end_process
from respec_trainer.watchdog.ending import Reporter, RunningClock, kill_lost, lost_contact, main_stack
from respec_trainer.watchdog.judge import Judge
from respec_trainer.watchdog.messages import (
    MOST_CHARACTERS,
    Answer,
    Beat,
    Process,
    State,
    Verdict,
    decode_answer,
    decode_beat,
    encode,
)
from respec_trainer.watchdog.words import ended_text, failed_text

FAREWELL_BEATS = 4  # intervals from a verdict to the end, in which it is sent to all ranks
STOP_BEATS = 10  # most beats by which a rank reports that it is done, until it gets an answer


class Watchdog:
    """The watchdog of one rank. A run of one rank has no others to watch, but it can hang."""

    def __init__(self, run: RunConfig, rank: int, world_size: int, watched: int):
        """Open the socket at MASTER_ADDR and MASTER_PORT. Raises ConfigError if they are missing or the port is in use.

        `watched`: number of ranks, the first ones, that the run needs. Other ranks only end with the run.
        """
        self.rank, self.interval, self.lost_after = rank, min(1.0, run.lost_after / 10), run.lost_after
        self.process, self.clock = Process.this(), RunningClock(2 * self.interval)
        self.judge = Judge(range(watched) if rank == 0 else [0], self.process.home, run.lost_after, run.hang_timeout)
        self.state: State = "running"
        self.step, self.phase, self.moves, self.note = 0, "starting", 0, ""
        self.entered = self.clock.seconds
        self.wants_stack = False
        self.verdict: Verdict | None = None
        self.answered = 0
        self.addresses: dict[int, tuple[str, tuple]] = {}  # home and address of the other ranks; on the first rank
        self.socket = self._open() if world_size > 1 else None
        self.reporter = Reporter(":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="respec-watchdog")

    def start(self) -> None:
        self._thread.start()

    def met(self) -> None:
        """Note that the ranks have met in a process group: from now on every rank must send beats."""
        self.judge.met(self.clock.seconds)

    def enter(self, step: int, phase: str) -> None:
        """Note that this rank begins a phase. Every rank enters the same phases in the same order."""
        self.entered, self.step, self.phase, self.moves = self.clock.seconds, step, phase, self.moves + 1

    def stop(self) -> None:
        """Report that this rank's work is done, so that its silence is no fault."""
        self.state = "done"
        self._stopping.set()
        self._thread.join()
        before = self.answered
        for _ in range(STOP_BEATS):
            self._send()
            if self.socket is None or self.rank == 0 or self.answered > before or self.judge.is_done(0):
                return
            self._receive(self.interval)

    def fail(self, error: BaseException, notify: Callable[[], None], lost: bool = False) -> None:
        """Report to the other ranks that this rank ends with `error`; `notify` prints it, once for each host.

        Returns after enough time for the other ranks to receive the report, so that the process may end. If `error`
        only shows that contact was lost (an error of torch, or `lost` is set), another rank is the cause: this method
        waits for the verdict, and then does not return.
        """
        if lost or lost_contact(error):
            self.state = "broken"
            self._thread.join(self.lost_after + 2 * FAREWELL_BEATS * self.interval)
        self._stopping.set()
        if self.verdict is not None:
            self._thread.join()
        if self.reporter.is_me():
            notify()
        self._send_last("failed", f"{type(error).__name__}: {error}"[: MOST_CHARACTERS // 3], failed_text)
        time.sleep(FAREWELL_BEATS * self.interval)

    def signalled(self, number: int) -> None:
        """Report that a signal ends this rank. If it came because a rank of this host died, print that instead."""
        if self.verdict is not None or self._stopping.is_set():
            return
        self._stopping.set()
        self._receive(0.0)  # reports of ranks that the same signal ended
        self.verdict = self.judge.died()
        if self.verdict is not None:
            self._print(self.verdict)
            self._send()
        else:
            self._send_last("ended", f"signal {number}", lambda beat: ended_text([beat], []))

    def _send_last(self, state: State, note: str, words: Callable[[Beat], str]) -> None:
        """Send the last beat of this rank, twice because datagrams can be lost. `words`: the first rank's verdict."""
        self.state, self.note = state, note
        if self.rank == 0:
            self.verdict = Verdict(words(self._beat()))
        for _ in range(2):
            self._send()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and self.verdict is None:
                now = self.clock.tick()
                self._send()
                self._receive(self.interval)
                if self.rank == 0:
                    self.judge.record(self._beat(), now)
                if self.judge.decide(now) is not None:
                    self._receive(0.0)  # beats that were not read yet may change the decision
                    self.verdict = self.verdict or self.judge.decide(now)
                if self.rank == 0:
                    self.verdict = self.verdict or self.judge.hanging(now)
                    self.wants_stack = self.judge.asked_at is not None
            if self.verdict is not None and not self._stopping.is_set():
                self._conclude(self.verdict)
        except BaseException:  # without its thread this rank would be silent, and be reported as the cause
            traceback.print_exc()
            end_process(1)

    def _conclude(self, verdict: Verdict) -> None:
        self._print(verdict)
        until = time.monotonic() + FAREWELL_BEATS * self.interval
        while time.monotonic() < until:
            self._send()
            self._receive(self.interval)
        kill_lost(verdict.lost, self.process)
        end_process(1)

    def _print(self, verdict: Verdict) -> None:
        if self.reporter.is_me():
            print(f"\nerror: {verdict.text}", file=sys.stderr, flush=True)

    def _beat(self) -> Beat:
        still = self.clock.seconds - self.entered
        stack, waits = main_stack() if self.wants_stack else ("", False)
        place = (self.step, self.phase, self.moves, still)
        return Beat(self.rank, self.process, self.state, *place, self.note, stack, waits)

    def _send(self) -> None:
        """Send a beat to the first rank; on the first rank, send its state or verdict to all others."""
        if self.socket is None:
            return
        if self.rank == 0:
            has_news = self.verdict is not None or self.state != "running"
            for home, address in list(self.addresses.values()) if has_news else ():
                self._send_to(self._answer(home), address)
        else:
            self._send_to(encode(self._beat()), self.server)

    def _send_to(self, data: bytes, address: tuple) -> None:
        with contextlib.suppress(OSError):  # no route now: the receiver notices the silence
            self.socket.sendto(data, address)

    def _answer(self, home: str) -> bytes:
        """Return the answer for a rank of that home, with the lost processes of that home, which it can kill."""
        verdict = self.verdict and Verdict(self.verdict.text, tuple(p for p in self.verdict.lost if p.home == home))
        return encode(Answer(self._beat(), self.judge.asked_at is not None, verdict))

    def _receive(self, seconds: float) -> None:
        """Handle messages for `seconds`, and at least those that have arrived."""
        until = time.monotonic() + seconds
        while self.socket is not None:
            ready, _, _ = select.select([self.socket], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            try:
                data, address = self.socket.recvfrom(65536)
                message = decode_beat(data) if self.rank == 0 else decode_answer(data)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nothing to read after all, or foreign data on the port
            self._handle(message, address)
        self._stopping.wait(seconds)

    def _handle(self, message: Beat | Answer, address: tuple) -> None:
        now = self.clock.seconds
        if isinstance(message, Beat):
            if self.judge.record(message, now):
                self.addresses[message.rank] = message.process.home, address
                self._send_to(self._answer(message.process.home), address)
        elif self.judge.record(message.judge, now):
            self.answered += 1
            self.wants_stack, self.verdict = message.stack, self.verdict or message.verdict

    def _open(self) -> socket.socket:
        """Open the socket, on the first rank at the port to which the others send. Sets `server`."""
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except KeyError as error:
            raise ConfigError(
                f"{error.args[0]} not set; start with `deepspeed --num_gpus N launch/train.py ...`"
            ) from None
        try:
            family, *_, self.server = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            raise ConfigError(f"MASTER_ADDR={host} is no known host: {error}") from error
        opened = socket.socket(family, socket.SOCK_DGRAM)
        opened.setblocking(False)
        if self.rank == 0:
            try:
                opened.bind(("", port))
            except OSError as error:
                raise ConfigError(
                    f"UDP port {port}, where the first rank watches the others, is occupied ({error}); start with "
                    "--master_port ANOTHER"
                ) from error
        return opened
