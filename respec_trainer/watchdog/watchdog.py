"""Watchdog: every rank tells the first rank once a second where it is; the first rank judges, the others watch it.

Beats and answers are UDP datagrams to the port of MASTER_PORT on the first rank's host: nothing that a dead host or a
cut link could block, and nothing that a step waits for. A thread does it all, also while the main thread sits in a
collective or hangs. A verdict goes to every rank with the next answers; a rank that gets no answers any more reaches
its own about the first. Each host says it once, and every rank ends, its children first.
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
from respec_trainer.watchdog.ending import RunningClock, Speaker, kill_lost, lost_contact, main_stack
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

FAREWELL_BEATS = 4  # intervals from a verdict to the end, in which all ranks hear of it
STOP_BEATS = 10  # times that a rank says that it is done, until it is answered


class Watchdog:
    """Of one rank; a run of one rank has nobody to lose, but can hang."""

    def __init__(self, run: RunConfig, rank: int, world_size: int, watched: int):
        """Reads MASTER_ADDR and MASTER_PORT. Raises ConfigError where they are missing or the port is occupied.

        `watched`: so many ranks, the first ones, must live for the run to go on. The others only end with it.
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
        self.addresses: dict[int, tuple[str, tuple]] = {}  # home and address of the other ranks, on the first
        self.socket = self._open() if world_size > 1 else None
        self.speaker = Speaker(":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="respec-watchdog")

    def start(self) -> None:
        self._thread.start()

    def met(self) -> None:
        """The ranks have met in a process group: from now on silence counts."""
        self.judge.met(self.clock.seconds)

    def enter(self, step: int, phase: str) -> None:
        """This rank begins a phase. Every rank enters the same phases in the same order."""
        self.entered, self.step, self.phase, self.moves = self.clock.seconds, step, phase, self.moves + 1

    def stop(self) -> None:
        """This rank has done its work: nobody shall miss it."""
        self.state = "done"
        self._stopping.set()
        self._thread.join()
        heard = self.answered
        for _ in range(STOP_BEATS):
            self._send()
            if self.socket is None or self.rank == 0 or self.answered > heard or self.judge.is_done(0):
                return
            self._receive(self.interval)

    def fail(self, error: BaseException, tell: Callable[[], None], lost: bool = False) -> None:
        """Tell the others that this rank ends with `error`, and have `tell` tell the user if nobody else here has.

        Returns when the others on this host know that it has been told, so that the process may end. Where `error` is
        only that contact was lost, as it is if it is one of torch's or `lost`, who is to blame is waited for, and says
        so: then this does not return.
        """
        if lost or lost_contact(error):
            self.state = "broken"
            self._thread.join(self.lost_after + 2 * FAREWELL_BEATS * self.interval)
        self._stopping.set()
        if self.verdict is not None:
            self._thread.join()
        if self.speaker.is_me():
            tell()
        self._say("failed", f"{type(error).__name__}: {error}"[: MOST_CHARACTERS // 3], failed_text)
        time.sleep(FAREWELL_BEATS * self.interval)

    def signalled(self, number: int) -> None:
        """A signal ends this rank. Where it came because a rank of this host died, say so; else tell the others."""
        if self.verdict is not None or self._stopping.is_set():
            return
        self._stopping.set()
        self._receive(0.0)  # ranks that the same signal ended have said so
        self.verdict = self.judge.died()
        if self.verdict is not None:
            self._speak(self.verdict)
            self._send()
        else:
            self._say("ended", f"signal {number}", lambda beat: ended_text([beat], []))

    def _say(self, state: State, note: str, words: Callable[[Beat], str]) -> None:
        """The last words of this rank. Twice, since datagrams can be lost."""
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
                    self.judge.hear(self._beat(), now)
                if self.judge.decide(now) is not None:
                    self._receive(0.0)  # what waited to be read may say otherwise
                    self.verdict = self.verdict or self.judge.decide(now)
                if self.rank == 0:
                    self.verdict = self.verdict or self.judge.hanging(now)
                    self.wants_stack = self.judge.asked_at is not None
            if self.verdict is not None and not self._stopping.is_set():
                self._conclude(self.verdict)
        except BaseException:  # without it this rank would be missed, and take the blame
            traceback.print_exc()
            end_process(1)

    def _conclude(self, verdict: Verdict) -> None:
        self._speak(verdict)
        until = time.monotonic() + FAREWELL_BEATS * self.interval
        while time.monotonic() < until:
            self._send()
            self._receive(self.interval)
        kill_lost(verdict.lost, self.process)
        end_process(1)

    def _speak(self, verdict: Verdict) -> None:
        if self.speaker.is_me():
            print(f"\nerror: {verdict.text}", file=sys.stderr, flush=True)

    def _beat(self) -> Beat:
        still = self.clock.seconds - self.entered
        stack, waits = main_stack() if self.wants_stack else ("", False)
        place = (self.step, self.phase, self.moves, still)
        return Beat(self.rank, self.process, self.state, *place, self.note, stack, waits)

    def _send(self) -> None:
        """A beat to the first rank; from the first rank, what it has to say to all."""
        if self.socket is None:
            return
        if self.rank == 0:
            tells = self.verdict is not None or self.state != "running"
            for home, address in list(self.addresses.values()) if tells else ():
                self._send_to(self._answer(home), address)
        else:
            self._send_to(encode(self._beat()), self.server)

    def _send_to(self, data: bytes, address: tuple) -> None:
        with contextlib.suppress(OSError):  # no route now: that is silence
            self.socket.sendto(data, address)

    def _answer(self, home: str) -> bytes:
        """For a rank of that home, which can kill the lost of its own only."""
        verdict = self.verdict and Verdict(self.verdict.text, tuple(p for p in self.verdict.lost if p.home == home))
        return encode(Answer(self._beat(), self.judge.asked_at is not None, verdict))

    def _receive(self, seconds: float) -> None:
        """Read what arrives within `seconds`, and at least what is there."""
        until = time.monotonic() + seconds
        while self.socket is not None:
            ready, _, _ = select.select([self.socket], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            try:
                data, address = self.socket.recvfrom(65536)
                message = decode_beat(data) if self.rank == 0 else decode_answer(data)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nothing to read after all, or noise on the port
            self._hear(message, address)
        self._stopping.wait(seconds)

    def _hear(self, message: Beat | Answer, address: tuple) -> None:
        now = self.clock.seconds
        if isinstance(message, Beat):
            if self.judge.hear(message, now):
                self.addresses[message.rank] = message.process.home, address
                self._send_to(self._answer(message.process.home), address)
        elif self.judge.hear(message.judge, now):
            self.answered += 1
            self.wants_stack, self.verdict = message.stack, self.verdict or message.verdict

    def _open(self) -> socket.socket:
        """The socket: on the first rank, at the port where the others expect it. Sets `server`."""
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
