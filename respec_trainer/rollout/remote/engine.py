"""RemoteEngine: an engine that lives on a rank of its own, as the training rank that speaks for it sees it.

Every call travels to `engine_host.py`, which makes it on the engine there, and its result or its error travels back.
So the trainer's side of rollouts, resync and restarts is the same wherever an engine lives. A host that is gone is a
dead engine: to start it again is to wait for the next host.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.hosts import HostFacts, engine_host_differences
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.engine import Pending, Role, RolloutEngine, TensorSpec
from respec_trainer.rollout.remote.link import Connection, HostAbsentError, cut, hang_up, job_store, reach
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.rollout.sglang.engine import SEEDS_BETWEEN_LIVES
from respec_trainer.rollout.sglang.settings import EngineSettings

BEATS = 20  # signs of life that a host gives within rollout.engine.timeout


class Caller:
    """Calls to the other side, several at a time. A thread takes the answers, so that neither side waits to be read."""

    def __init__(self, connection: Connection, peer: str, patience: float):
        """`patience`: seconds without a word after which the other side counts as hung, and the connection is cut."""
        self.connection, self.peer, self.patience = connection, peer, patience
        self.failure: EngineError | None = None  # why no call will succeed any more
        self._waiting: dict[int, Future] = {}
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name=f"calls to {peer}").start()

    def call(self, name: str, *args: Any) -> Future:
        """Have it done; the Future brings what it returned or raised. Raises EngineError if the connection broke."""
        answer: Future = Future()
        answer.set_running_or_notify_cancel()
        with self._sending:
            number = next(self._numbers)
            self._waiting[number] = answer
            try:
                self.connection.send((number, name, args))
            except OSError as error:
                self._break(error)
        if self.failure is not None:  # perhaps only after it was sent: then nobody answers
            self._break(self.failure)
            raise self.failure
        return answer

    def close(self) -> None:
        hang_up(self.connection)

    def _listen(self) -> None:
        try:
            while True:
                self._await_word()
                number, failed, value = self.connection.recv()
                if number is None:  # a sign of life
                    continue
                answer = self._waiting.pop(number)
                answer.set_exception(value) if failed else answer.set_result(value)
        except Exception as error:  # noqa: BLE001 - whatever ends this thread, those who wait must hear of it
            self._break(error)
            cut(self.connection)

    def _await_word(self) -> None:
        for _ in range(BEATS):  # not one long wait: time in which this process itself was stopped counts as one part
            if self.connection.poll(self.patience / BEATS):
                return
        raise EngineError(f"it gave no sign of life for {self.patience:g} s (rollout.engine.timeout)")

    def _break(self, error: Exception) -> None:
        if self.failure is None:
            # Which of these it is hangs on who notices first, the thread that sends or the one that listens.
            gone = isinstance(error, EOFError | OSError)
            reason = str(error) if isinstance(error, EngineError) else repr(error)
            if gone:
                reason = "it ended, or its machine did" + (f" ({error})" if str(error) else "")
            self.failure = EngineError(f"lost the connection to {self.peer}: {reason}")
        while self._waiting:
            try:
                answer = self._waiting.popitem()[1]
            except KeyError:  # the other thread was faster
                return
            answer.set_exception(self.failure)


class RemotePending(Pending):
    """Requests that the engine is working on; `number` is the host's for them."""

    def __init__(self, caller: Caller, number: int, requests: int):
        self.caller, self.number, self.requests = caller, number, requests
        self.samples: list[Sample] | None = None

    def collect(self) -> list[Sample]:
        if self.samples is None:
            self.samples = self.caller.call("collect", self.number).result()
        return self.samples

    def done(self) -> int:
        return self.requests if self.samples is not None else self.caller.call("done", self.number).result()

    def delivered(self) -> list[Sample]:
        return self.caller.call("delivered", self.number).result()


class RemoteEngine(RolloutEngine):
    """Engine number `index` of the run, made of `settings` by its host."""

    def __init__(self, settings: EngineSettings, index: int):
        self.settings, self.index = settings, index
        self.host = ""  # name of the last one
        self._facts: HostFacts | None = None  # of this host, as it was when the run began
        self._lives = 0  # of the engine, on whatever hosts
        self._store: dist.Store | None = None
        self._caller: Caller | None = None

    def start(self) -> None:
        """Have the host start the engine. Where there is none, or it is gone, the next that offers itself is taken.

        Raises HostAbsentError if none comes within `rollout.engine.timeout`, EngineError if it is not like this host.
        """
        if not self._host_answers():
            self._take_host()
        self._lives += 1
        self._ask("start")

    def release(self) -> None:
        """Let the host go, for good, with a goodbye. It ends its engine if it still runs."""
        if self._caller is not None:
            self._dismiss(self._caller, None)
            self._caller = None

    @property
    def failure(self) -> EngineError | None:
        if self._caller is None:
            return EngineError("the rollout engine is not running")
        try:
            return self._caller.failure or self._ask("failure")
        except EngineError as error:  # the host was lost meanwhile
            return error

    @property
    def versions(self) -> dict[Role, str]:
        return self._ask("versions")

    def submit(self, requests: Sequence[Request]) -> RemotePending:
        return RemotePending(self._reached, self._ask("submit", list(requests)), len(requests))

    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        return self._reached.call("join_group", name, address, port, world_size, rank_offset, backend)

    def leave_group(self, name: str) -> None:
        self._ask("leave_group", name)

    def weight_shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        return self._ask("weight_shapes", role)

    def begin_weight_update(self, role: Role, names: Collection[str] = ()) -> None:
        self._ask("begin_weight_update", role, list(names))

    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        return self._reached.call("receive_broadcast", list(specs), role, group)

    def receive_tensors(self, tensors: Sequence, role: Role) -> Future:
        raise EngineError("memory handles do not reach an engine on a rank of its own: set resync.transport=auto")

    def end_weight_update(self, role: Role, version: str) -> None:
        self._ask("end_weight_update", role, version)

    def abort_weight_update(self) -> None:
        self._ask("abort_weight_update")

    def distrust(self, reason: str) -> None:
        self._ask("distrust", reason)

    def trust(self) -> None:
        self._ask("trust")

    def digests(self, role: Role) -> dict[str, str]:
        return self._ask("digests", role)

    def sleep(self) -> None:
        self._ask("sleep")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._ask("wake", part)

    def take_decode_log(self) -> DecodeLog:
        return self._ask("take_decode_log")

    def restore_depth_chooser(self, state: str) -> None:
        self._ask("restore_depth_chooser", state)

    def shutdown(self) -> None:
        """End every process of the engine; nothing happens if its host was never reached, or is gone."""
        if self._caller is not None:
            try:
                self._ask("shutdown")
            except EngineError:
                if self._caller.failure is None:
                    raise

    def _host_answers(self) -> bool:
        """It is asked, because a connection may have broken without anybody having noticed."""
        if self._caller is None:
            return False
        with contextlib.suppress(EngineError):
            self._ask("failure")
        return self._caller.failure is None

    def _take_host(self) -> None:
        """Connect to the next host, and have it make the engine if it is like this one."""
        if self._caller is not None:
            self._caller.close()
            self._caller = None
        caller = self._next_host()
        try:
            self.host = self._compare(caller)
            # A host counts its engine's lives from 0, but no two lives may draw from the same seed.
            seed = (self.settings.seed + self._lives * SEEDS_BETWEEN_LIVES) % 2**31
            caller.call("make", replace(self.settings, seed=seed)).result()
        except BaseException:
            caller.close()
            raise
        self._caller = caller

    def _next_host(self) -> Caller:
        limit = self.settings.engine.timeout
        self._store = self._store or job_store(limit)
        try:
            connection = reach(self._store, self.index, limit)
        except HostAbsentError as error:
            was = f" (it was {self.host})" if self.host else ""
            raise HostAbsentError(f"{error}; start its ranks{was} in time, see docs/failures.md") from error
        return Caller(connection, f"the host of engine {self.index}", limit)

    def _compare(self, caller: Caller) -> str:
        """The host's name. Raises EngineError if it is not like this one, and tells it so."""
        self._facts = self._facts or HostFacts.here()  # the files of a later day are not what this process has loaded
        theirs: HostFacts = caller.call("facts").result()
        caller.peer += f", {theirs.host}"
        if differing := engine_host_differences(self._facts, theirs):
            text = f"{caller.peer} is not like those that train:\n" + "\n".join(f"  {line}" for line in differing)
            text += "\ninstall the same versions and code on it, and start its ranks again"
            self._dismiss(caller, text)
            raise EngineError(text)
        return theirs.host

    def _dismiss(self, caller: Caller, reason: str | None) -> None:
        """Let a host go; `reason`: why it is refused."""
        with contextlib.suppress(EngineError):  # it is gone already
            caller.call("dismiss", reason).result()
        caller.close()

    @property
    def _reached(self) -> Caller:
        if self._caller is None:
            raise EngineError("the rollout engine is not running: call start() first")
        return self._caller

    def _ask(self, name: str, *args: Any) -> Any:
        return self._reached.call(name, *args).result()
