"""RemoteEngine: the interface of an engine that runs on a rank of its own, for the training rank that owns it.

Every call is sent to `host.py`, which makes it on the engine there and returns its result or its error. So the
trainer's side of rollouts, resync and restarts is the same wherever an engine runs. If the host is lost, the engine
counts as dead; starting it again waits for the next host.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.hosts import HostFacts, engine_host_differences
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.engine import Pending, Role, RolloutEngine, TensorSpec
from respec_trainer.rollout.remote.link import Connection, HostAbsentError, close, cut, job_store, reach
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.rollout.sglang.settings import EngineSettings

BEATS = 20  # heartbeats that a host sends within rollout.engine.timeout


class Caller:
    """Calls to a host, several at a time. A thread receives the answers, so that neither side blocks while sending."""

    def __init__(self, connection: Connection, peer: str, timeout: float):
        """`timeout`: seconds without a message after which the host counts as hung, and the connection is cut."""
        self.connection, self.peer, self.timeout = connection, peer, timeout
        self.failure: EngineError | None = None  # set once the connection is lost: every later call raises it
        self._waiting: dict[int, Future] = {}
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name=f"calls to {peer}").start()

    def call(self, name: str, *args: Any) -> Future:
        """Send a call; the Future gets its result or its exception. Raises EngineError if the connection is lost."""
        answer: Future = Future()
        answer.set_running_or_notify_cancel()
        with self._sending:
            number = next(self._numbers)
            self._waiting[number] = answer
            try:
                self.connection.send((number, name, args))
            except OSError as error:
                self._break(error)
        if self.failure is not None:  # if it was set after the send, no answer will come
            self._break(self.failure)
            raise self.failure
        return answer

    def close(self) -> None:
        close(self.connection)

    def _listen(self) -> None:
        try:
            while True:
                self._await_message()
                number, failed, value = self.connection.recv()
                if number is None:  # a heartbeat
                    continue
                answer = self._waiting.pop(number)
                answer.set_exception(value) if failed else answer.set_result(value)
        except Exception as error:  # noqa: BLE001 - any error that ends this thread must reach the waiting calls
            self._break(error)
            cut(self.connection)

    def _await_message(self) -> None:
        for _ in range(BEATS):  # short waits: if this process itself is stopped, that costs only one of them
            if self.connection.poll(self.timeout / BEATS):
                return
        raise EngineError(f"it gave no sign of life for {self.timeout:g} s (rollout.engine.timeout)")

    def _break(self, error: Exception) -> None:
        if self.failure is None:
            # The type depends on which thread detects the loss first, the sending or the listening one.
            gone = isinstance(error, EOFError | OSError)
            reason = str(error) if isinstance(error, EngineError) else repr(error)
            if gone:
                reason = "it ended, or its machine is down" + (f" ({error})" if str(error) else "")
            self.failure = EngineError(f"lost the connection to {self.peer}: {reason}")
        while self._waiting:
            try:
                answer = self._waiting.popitem()[1]
            except KeyError:  # the other thread was faster
                return
            answer.set_exception(self.failure)


class RemotePending(Pending):
    """Requests that the engine is working on; `number` identifies them on the host."""

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
    """Engine number `index` of the run; its host makes it from `settings`."""

    def __init__(self, settings: EngineSettings, index: int):
        self.settings, self.index = settings, index
        self.host = ""  # name of the latest host
        self._facts: HostFacts | None = None  # of this machine, at the first start
        self._lives = 0  # starts of the engine, on all hosts
        self._store: dist.Store | None = None
        self._caller: Caller | None = None

    def start(self) -> None:
        """Make the host start the engine. If there is no host, or it is lost, take the next one that offers itself.

        Raises HostAbsentError if none comes within `rollout.engine.timeout`, EngineError if it does not match this
        machine.
        """
        if not self._host_answers():
            self._take_host()
        self._lives += 1
        self._ask("start")

    def release(self) -> None:
        """Dismiss the host for good. It ends its engine if that still runs."""
        if self._caller is not None:
            self._dismiss(self._caller, None)
            self._caller = None

    @property
    def failure(self) -> EngineError | None:
        if self._caller is None:
            return EngineError("the rollout engine is not running")
        try:
            return self._caller.failure or self._ask("failure")
        except EngineError as error:  # the host was lost during the call
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
        raise EngineError("an engine on a rank of its own cannot read this rank's memory: set resync.transport=auto")

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
        """End every process of the engine. Do nothing if its host was never reached, or is lost."""
        if self._caller is not None:
            try:
                self._ask("shutdown")
            except EngineError:
                if self._caller.failure is None:
                    raise

    def _host_answers(self) -> bool:
        """Return whether the host answers a call. A broken connection may show only then."""
        if self._caller is None:
            return False
        with contextlib.suppress(EngineError):
            self._ask("failure")
        return self._caller.failure is None

    def _take_host(self) -> None:
        """Connect to the next host, and make it create the engine if it matches this machine."""
        if self._caller is not None:
            self._caller.close()
            self._caller = None
        caller = self._next_host()
        try:
            self.host = self._compare(caller)
            # A new host counts its engine's starts from 0, but no two starts may use the same seed.
            caller.call("make", self.settings.of_start(self._lives)).result()
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
        """Return the host's name. Raises EngineError if it does not match this machine, and sends it the reason."""
        self._facts = self._facts or HostFacts.here()  # read once: later the files may differ from the loaded code
        theirs: HostFacts = caller.call("facts").result()
        caller.peer += f", {theirs.host}"
        if differing := engine_host_differences(self._facts, theirs):
            text = f"{caller.peer} does not match those that train:\n" + "\n".join(f"  {line}" for line in differing)
            text += "\ninstall the same versions and code on it, and start its ranks again"
            self._dismiss(caller, text)
            raise EngineError(text)
        return theirs.host

    def _dismiss(self, caller: Caller, reason: str | None) -> None:
        """Dismiss a host. `reason`: why it is refused, or None."""
        with contextlib.suppress(EngineError):  # it is lost already
            caller.call("dismiss", reason).result()
        caller.close()

    @property
    def _reached(self) -> Caller:
        if self._caller is None:
            raise EngineError("the rollout engine is not running: call start() first")
        return self._caller

    def _ask(self, name: str, *args: Any) -> Any:
        return self._reached.call(name, *args).result()
