"""EngineHost: what a rank does that holds an engine and does not train. `remote_engine.py` is the other side."""

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
from respec_trainer.rollout.remote.link import Connection, LinkLostError, hang_up, job_store, offer
from respec_trainer.rollout.sample import Sample
from respec_trainer.rollout.sglang.settings import EngineSettings


def host_engine(config: Config, rank: int, world_size: int) -> None:
    """Hold this rank's engine until the rank that speaks for it says goodbye.

    A rank whose device is another's engine's has nothing to do. Raises EngineError if the job's first rank does not
    come within `rollout.engine.timeout`, or is gone before this host is wanted; LinkLostError if the rank that speaks
    for the engine is gone; ConfigError if this host is not like the one it is on.
    """
    placement = Placement.of(config, world_size)
    if rank in placement.engine_launchers:
        index = placement.engine_launchers.index(rank)
        connection = offer(job_store(config.rollout.engine.timeout), index)
        EngineHost(connection, f"rank {placement.owners[index]}", _make_engine).run()


@dataclass(frozen=True)
class _Collected:
    """What is left of a Pending. The other side may still ask how far it is, as long as it has not got the samples."""

    requests: int

    def done(self) -> int:
        return self.requests


class EngineHost:
    """Makes the calls that arrive, one after the other; what takes its time is answered when it is done."""

    def __init__(self, connection: Connection, owner: str, make_engine: Callable[[EngineSettings], RolloutEngine]):
        """`owner`: the rank that speaks for the engine, in words."""
        self.connection, self.owner, self.make_engine = connection, owner, make_engine
        self.engine: RolloutEngine | None = None
        self.pending: dict[int, Pending | _Collected] = {}  # by the number of the call that submitted it
        self.waiters = ThreadPoolExecutor(thread_name_prefix="collect")
        self.refused: str | None = None  # why the other side does not want this host
        self._sending = threading.Lock()
        self._over = threading.Event()

    def run(self) -> None:
        """Serve until the other side says goodbye.

        Raises ConfigError if it refuses this host, LinkLostError if it is gone without a word.
        """
        try:
            while not self._over.is_set():
                self._serve(*self.connection.recv())
        except (EOFError, OSError) as error:
            raise LinkLostError(
                f"{self.owner}, for which this host holds an engine, or the link to it is gone without a goodbye; "
                "start this host again, and it waits for the run to take it"
            ) from error
        finally:
            self._over.set()
            if self.engine is not None:
                self.engine.shutdown()
            self.waiters.shutdown()  # without an engine nobody waits
            hang_up(self.connection)
        if self.refused is not None:
            raise ConfigError(self.refused)

    def _serve(self, number: int, name: str, args: tuple) -> None:
        try:
            outcome = self._do(number, name, args)
        except Exception as error:  # noqa: BLE001 - it is raised where the call was made
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
            self.pending.clear()  # of the life before
        attribute = getattr(self.engine, name)
        return attribute(*args) if callable(attribute) else attribute

    def _make(self, settings: EngineSettings) -> None:
        self.engine = self.make_engine(settings)
        pause = settings.engine.timeout / BEATS
        threading.Thread(target=self._beat, args=(pause,), daemon=True, name="signs of life").start()

    def _beat(self, pause: float) -> None:
        """Tell the other side now and then that this process runs, whatever the main thread waits for."""
        while not self._over.wait(pause):
            self._send(None, False, None)

    def _collect(self, number: int) -> list[Sample]:
        samples = self.pending[number].collect()
        self.pending[number] = _Collected(len(samples))  # the other side keeps them
        return samples

    def _settle(self, number: int, future: Future) -> None:
        error = future.exception()
        if error is None:
            self._send(number, False, future.result())
        else:
            self._refuse(number, error)

    def _refuse(self, number: int, error: BaseException) -> None:
        if not isinstance(error, RespecError):  # which may not survive the way, nor be known there
            error = EngineError("".join(traceback.format_exception(error)))
        self._send(number, True, error)

    def _send(self, number: int | None, failed: bool, value: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # nobody listens any more: `run` will see it too
            self.connection.send((number, failed, value))


def _make_engine(settings: EngineSettings) -> RolloutEngine:
    from respec_trainer.rollout.sglang.engine import SGLangEngine

    # The settings come from a rank with another device.
    gpu = int(os.environ["LOCAL_RANK"]) if settings.device == "cuda" else settings.base_gpu_id
    return SGLangEngine(replace(settings, base_gpu_id=gpu))
