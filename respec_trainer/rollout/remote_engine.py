"""RemoteEngine: an engine that lives on a rank of its own, as the training rank that speaks for it sees it.

Every call travels to `engine_host.py`, which makes it on the engine there, and its result or its error travels back.
So the trainer's side of rollouts, resync and restarts is the same wherever an engine lives.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending, Role, RolloutEngine, TensorSpec
from respec_trainer.rollout.link import Connection, hang_up, job_store, reach
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.rollout.sglang_args import EngineSettings
from respec_trainer.rollout.steps import StepLog


class Caller:
    """Calls to the other side, several at a time. A thread takes the answers, so that neither side waits to be read."""

    def __init__(self, connection: Connection, peer: str):
        self.connection, self.peer = connection, peer
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
                number, failed, value = self.connection.recv()
                answer = self._waiting.pop(number)
                answer.set_exception(value) if failed else answer.set_result(value)
        except Exception as error:  # noqa: BLE001 - whatever ends this thread, those who wait must hear of it
            self._break(error)

    def _break(self, error: Exception) -> None:
        if self.failure is None:
            # Which of these it is hangs on who notices first, the thread that sends or the one that listens.
            gone = isinstance(error, EOFError | OSError)
            reason = "it ended, or its machine did" if gone else repr(error)
            reason += f" ({error})" if gone and str(error) else ""
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
        self._caller: Caller | None = None

    def start(self) -> None:
        """Reach the host if this has not been done, and have it start the engine."""
        if self._caller is None:
            limit = self.settings.engine.timeout
            connection = reach(job_store(limit), self.index, limit)
            self._caller = Caller(connection, f"the host of engine {self.index}")
            self._ask("make", self.settings)
        self._ask("start")

    def release(self) -> None:
        """Let the host go, for good. It ends its engine if it still runs."""
        if self._caller is not None:
            self._caller.close()

    @property
    def failure(self) -> EngineError | None:
        if self._caller is None:
            return EngineError("the rollout engine is not running")
        return self._caller.failure or self._ask("failure")

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

    def stats(self) -> dict[str, float]:
        return self._ask("stats")

    def take_steps(self) -> StepLog:
        return self._ask("take_steps")

    def load_policy(self, state: str) -> None:
        self._ask("load_policy", state)

    def shutdown(self) -> None:
        """End every process of the engine; nothing happens if its host was never reached, or is gone."""
        if self._caller is not None and self._caller.failure is None:
            self._ask("shutdown")

    @property
    def _reached(self) -> Caller:
        if self._caller is None:
            raise EngineError("the rollout engine is not running: call start() first")
        return self._caller

    def _ask(self, name: str, *args: Any) -> Any:
        return self._reached.call(name, *args).result()
