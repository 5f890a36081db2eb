"""EngineHost: a rank that runs an engine and does not train. `engine.py` is the training rank's side."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError, EngineError, RespecError
from respec_trainer.hosts import HostFacts
from respec_trainer.placement import Placement
from respec_trainer.rollout.engine import Pending, RolloutEngine
from respec_trainer.rollout.remote.engine import BEATS
from respec_trainer.rollout.remote.link import Connection, LinkLostError, close, job_store, offer
from respec_trainer.rollout.sample import Sample
from respec_trainer.rollout.sglang.settings import EngineSettings


def host_engine(config: Config, rank: int, world_size: int) -> None:
    """Run this rank's engine until the training rank that owns it dismisses this host.

    Return at once on a rank whose device belongs to another rank's engine. Raises EngineError if the job's store does
    not answer within `rollout.engine.timeout`, or is lost before a rank connects; LinkLostError if the connection to
    the owner is lost; ConfigError if this machine does not match the owner's.
    """
    placement = Placement.of(config, world_size)
    if rank in placement.engine_launchers:
        index = placement.engine_launchers.index(rank)
        connection = offer(job_store(config.rollout.engine.timeout), index)
        EngineHost(connection, f"rank {placement.owners[index]}", _make_engine).run()


@dataclass(frozen=True)
class _Collected:
    """A Pending whose samples were sent. The owner may still call `done` until it has received them."""

    requests: int

    def done(self) -> int:
        return self.requests


class EngineHost:
    """Makes the calls that arrive, in order, and answers those that return a Future when it resolves."""

    def __init__(self, connection: Connection, owner: str, make_engine: Callable[[EngineSettings], RolloutEngine]):
        """`owner`: the training rank that owns the engine, for messages."""
        self.connection, self.owner, self.make_engine = connection, owner, make_engine
        self.engine: RolloutEngine | None = None
        self.pending: dict[int, Pending | _Collected] = {}  # by the number of the call that submitted it
        self.waiters = ThreadPoolExecutor(thread_name_prefix="collect")
        self.refused: str | None = None  # why the owner refuses this host
        self._sending = threading.Lock()
        self._over = threading.Event()

    def run(self) -> None:
        """Serve until the owner dismisses this host.

        Raises ConfigError if the owner refuses this host, LinkLostError if the connection is lost without a dismissal.
        """
        try:
            while not self._over.is_set():
                self._serve(*self.connection.recv())
        except (EOFError, OSError) as error:
            raise LinkLostError(
                f"{self.owner}, for which this host holds an engine, or the link to it is gone without a "
                "dismissal; start this host again, and it waits for the run to take it"
            ) from error
        finally:
            self._over.set()
            if self.engine is not None:
                self.engine.shutdown()
            self.waiters.shutdown()  # without an engine no call waits
            close(self.connection)
        if self.refused is not None:
            raise ConfigError(self.refused)

    def _serve(self, number: int, name: str, args: tuple) -> None:
        try:
            outcome = self._do(number, name, args)
        except Exception as error:  # noqa: BLE001 - the owner raises it where the call was made
            self._refuse(number, error)
            return
        if isinstance(outcome, Future):
            outcome.add_done_callback(functools.partial(self._settle, number))
        else:
            self._send(number, False, outcome)

    def _do(self, number: int, name: str, args: tuple) -> Any:
        if name == "facts":
            return HostFacts.here()
        if name == "make":
            return self._make(*args)
        if name == "dismiss":
            (self.refused,) = args
            self._over.set()
            return None
        if name == "submit":
            self.pending[number] = self.engine.submit(*args)
            return number
        if name == "collect":
            return self.waiters.submit(self._collect, *args)
        if name in ("done", "delivered"):
            return getattr(self.pending[args[0]], name)()
        if name == "start":
            self.pending.clear()  # requests from before the restart
        attribute = getattr(self.engine, name)
        return attribute(*args) if callable(attribute) else attribute

    def _make(self, settings: EngineSettings) -> None:
        self.engine = self.make_engine(settings)
        pause = settings.engine.timeout / BEATS
        threading.Thread(target=self._beat, args=(pause,), daemon=True, name="heartbeats").start()

    def _beat(self, pause: float) -> None:
        """Send heartbeats, which show that this process runs even while the main thread waits."""
        while not self._over.wait(pause):
            self._send(None, False, None)

    def _collect(self, number: int) -> list[Sample]:
        samples = self.pending[number].collect()
        self.pending[number] = _Collected(len(samples))  # the owner keeps the samples
        return samples

    def _settle(self, number: int, future: Future) -> None:
        error = future.exception()
        if error is None:
            self._send(number, False, future.result())
        else:
            self._refuse(number, error)

    def _refuse(self, number: int, error: BaseException) -> None:
        if not isinstance(error, RespecError):  # other types may not unpickle on the owner's side
            error = EngineError("".join(traceback.format_exception(error)))
        self._send(number, True, error)

    def _send(self, number: int | None, failed: bool, value: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # the connection is lost: `run` detects it as well
            self.connection.send((number, failed, value))


def _make_engine(settings: EngineSettings) -> RolloutEngine:
    from respec_trainer.rollout.sglang.engine import SGLangEngine

    # The settings come from the owner, whose device is another.
    gpu = int(os.environ["LOCAL_RANK"]) if settings.device == "cuda" else settings.base_gpu_id
    return SGLangEngine(replace(settings, base_gpu_id=gpu))
