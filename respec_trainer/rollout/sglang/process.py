"""SGLangProcess: sglang's Engine inside this process, started without side effects, on a thread of its own.

sglang assumes that it owns its process: it sets environment variables and the logging configuration, installs signal
handlers, and on any failure kills every child of the process and the process itself. Here the process is a trainer's,
so the settings are restored afterwards, and every failure becomes an EngineError.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import multiprocessing
import multiprocessing.connection
import threading
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from respec_trainer.errors import EngineError
from respec_trainer.processes import kill_and_wait
from respec_trainer.rollout.plugin_contract import plugin_settings
from respec_trainer.rollout.sglang import workers
from respec_trainer.rollout.sglang.arguments import server_arguments, step_environment
from respec_trainer.rollout.sglang.delivery import Deliveries, delivery_environment
from respec_trainer.rollout.sglang.isolation import environment_of, side_effects_undone
from respec_trainer.rollout.sglang.settings import EngineSettings

KILL_SECONDS = 10.0

_running: SGLangProcess | None = None


class SGLangProcess:
    """A running sglang Engine. `call` runs coroutines of its tokenizer manager on the thread that owns it."""

    def __init__(self, settings: EngineSettings):
        """Start the engine; return when it answers. Raises EngineError if it does not start.

        sglang keeps its configuration in global variables, so a process can hold one engine at a time.
        """
        global _running
        if _running is not None:
            raise EngineError("this process already runs an sglang engine and can hold only one: shut it down first")
        self.settings = settings
        self.failure: EngineError | None = None
        self.deliveries = Deliveries()
        self._waiting: set[Future] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        workers.prepare_process(settings.device)
        before = set(multiprocessing.active_children())
        self.engine = self._start(before)
        self.children = [child for child in multiprocessing.active_children() if child not in before]
        _running = self
        atexit.register(self.shutdown)
        threading.Thread(target=self._watch, daemon=True, name="sglang-watcher").start()

    @property
    def manager(self) -> Any:
        """sglang's TokenizerManager. Its coroutines run through `call`."""
        return self.engine.tokenizer_manager

    def call(self, function: Callable[..., Awaitable], *args: Any) -> Future:
        """Run `function(*args)` on the engine's loop. If the engine dies meanwhile, the future raises EngineError."""
        answer: Future = Future()
        answer.set_running_or_notify_cancel()  # only `fail` may end it early
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._waiting.add(answer)
            running = asyncio.run_coroutine_threadsafe(function(*args), self._loop)
        running.add_done_callback(functools.partial(self._settle, answer))
        return answer

    def wait(self, answer: Future, doing: str) -> Any:
        """Return the result of `answer`. An engine that gives none within `rollout.engine.timeout` counts as dead."""
        limit = self.settings.engine.timeout
        try:
            return answer.result(limit)
        except concurrent.futures.TimeoutError:
            self.fail(f"{doing}: no answer for {limit:.0f} s (rollout.engine.timeout)")
            raise self.failure from None

    def fail(self, reason: str) -> None:
        """Declare the engine dead: every waiting call and every later one raises EngineError."""
        with self._lock:
            if self.failure is None:
                self.failure = EngineError(reason)
            waiting, self._waiting = self._waiting, set()
        for answer in waiting:
            answer.set_exception(self.failure)

    def shutdown(self) -> None:
        """Kill the engine's processes and end its thread."""
        global _running
        if self._closing:
            return
        self._closing = True
        self.fail("the rollout engine was shut down")
        kill_and_wait(self.children, KILL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(KILL_SECONDS)
        _remove_sockets(self.engine.port_args)
        atexit.unregister(self.shutdown)
        _running = None

    def _start(self, before: set) -> Any:
        ready: Future = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True, name="sglang-engine")
        engine = self.settings.engine
        environment = workers.engine_environment(self.settings.device, engine.threads, engine.tp)
        environment |= delivery_environment(engine.resume) | step_environment(self.settings.steps)
        with side_effects_undone(), environment_of(environment):
            self._thread.start()
            try:
                return ready.result(self.settings.engine.timeout)
            except BaseException as error:
                started = [child for child in multiprocessing.active_children() if child not in before]
                kill_and_wait(started, KILL_SECONDS)
                if not isinstance(error, Exception):
                    raise
                reason = "no answer" if isinstance(error, concurrent.futures.TimeoutError) else error
                raise EngineError(f"the rollout engine did not start: {reason}; its own messages are above") from error

    def _run(self, ready: Future) -> None:
        """Build the engine and run its loop, on a thread of its own, where sglang installs no signal handlers."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine_class = _engine_class(self.settings, self.deliveries, self.fail)
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            engine = engine_class(**server_arguments(self.settings))
        except BaseException as error:  # noqa: BLE001 - the waiting caller raises it
            ready.set_exception(error)
            return
        # These two would end the whole process, at exit and when a child dies. `shutdown` and `_watch` replace them.
        atexit.unregister(engine.shutdown)
        engine.tokenizer_manager._subprocess_watchdog.stop()
        ready.set_result(engine)
        self._loop.run_forever()
        self._close_loop()

    def _close_loop(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for socket in (self.manager.recv_from_detokenizer, self.manager.send_to_scheduler, self.engine.send_to_rpc):
            getattr(socket, "_sock", socket).close(linger=0)
        self._loop.close()

    def _settle(self, answer: Future, running: Future) -> None:
        with self._lock:
            if answer not in self._waiting:
                return  # `fail` has answered it
            self._waiting.discard(answer)
        if running.cancelled():
            answer.set_exception(EngineError("the rollout engine dropped a request"))
        elif error := running.exception():
            answer.set_exception(error)
        else:
            answer.set_result(running.result())

    def _watch(self) -> None:
        """Wait until a child process ends, and declare the engine dead."""
        children = {child.sentinel: child for child in self.children}
        dead = multiprocessing.connection.wait(list(children))
        if self._closing:
            return
        child = children[dead[0]]
        child.join()
        status = f"status {child.exitcode}" if child.exitcode >= 0 else f"signal {-child.exitcode}"
        self.fail(f"process {child.pid} of the rollout engine ended with {status}; its own messages are above")
        kill_and_wait(self.children, KILL_SECONDS)


def _engine_class(settings: EngineSettings, deliveries: Deliveries, fail: Callable[[str], None]) -> type:
    """Return sglang's Engine class with this package's processes, and with a detokenizer only where one is needed."""
    from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    class Manager(TokenizerManager):
        async def handle_loop(self) -> None:
            try:
                await super().handle_loop()
            except Exception as error:  # noqa: BLE001 - the base class would kill this process
                fail(f"sglang's tokenizer manager failed: {error!r}")

        async def _handle_batch_output(self, message: Any) -> None:
            states = [self.rid_to_state.get(rid) for rid in message.rids]
            await super()._handle_batch_output(message)
            deliveries.commit(states, message)

    plugin = plugin_settings(settings.device, settings.seeded, settings.steps, settings.truncated_logprobs)
    make_manager = functools.partial(init_tokenizer_manager, TokenizerManagerClass=Manager)

    class TrainersEngine(Engine):
        init_tokenizer_manager_func = staticmethod(make_manager)
        run_scheduler_process_func = staticmethod(workers.SchedulerWorker(settings.device, plugin))
        run_detokenizer_process_func = staticmethod(workers.DetokenizerWorker(settings.device, plugin))

        @classmethod
        def _launch_detokenizer_subprocesses(cls, server_args, port_args, run_detokenizer_process_func):
            if not settings.tokenizer:
                return [], []  # the scheduler then sends its token ids directly
            return super()._launch_detokenizer_subprocesses(server_args, port_args, run_detokenizer_process_func)

    return TrainersEngine


def _remove_sockets(port_args: Any) -> None:
    """Delete the files of sglang's sockets, which it leaves behind."""
    for value in vars(port_args).values():
        if isinstance(value, str) and value.startswith("ipc://"):
            Path(value.removeprefix("ipc://")).unlink(missing_ok=True)
