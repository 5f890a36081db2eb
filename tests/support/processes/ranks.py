"""Run a function on N ranks, one process each, from a test.

    def check(scale):                       # at module level: the processes import it by name
        init_parallel(config)               # RANK, WORLD_SIZE, MASTER_PORT ... are set, the port fresh for every call
        ...
        return dist.get_rank() * scale

    assert run_ranks(2, check, 3) == [0, 3]

The processes are forked with their imports done, see `forking`. Those of each world size live until pytest ends and
take one call after the other. Each call must leave no process group behind; `run_ranks` destroys a default one that is
left.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from respec_trainer.network import free_port

# Process groups that are still referenced have threads that poll, dozens for each call. Too many take the tests' cores.
MOST_THREADS = 150
# Whether ranks and their engines are forked with imports done. That works only on a CPU, so tests on GPUs set False.
FORKED = True
GRACE = 5.0  # seconds in which the other ranks may report, after one rank has failed


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on ranks 0 .. world_size - 1 and return what each returned, in rank order.

    Function, arguments and results are pickled. Raises AssertionError with the traceback of every rank that raised,
    died or, after `timeout` seconds, hangs; the processes are then ended and the next call starts new ones.
    """
    return _pool(world_size).call(function, args, timeout)


@functools.cache
def _pool(world_size: int) -> Ranks:
    pool = Ranks(world_size)
    atexit.register(pool.close)
    return pool


class Ranks:
    """`world_size` processes that wait for calls."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.processes: list = []
        self.pipes: list[Connection] = []

    def call(self, function: Callable, args: tuple, timeout: float) -> list[Any]:
        if self.processes and psutil.Process(self.processes[0].pid).num_threads() > MOST_THREADS:
            self.close()
        self._start()
        self._signal(signal.SIGCONT)
        payload = pickle.dumps((free_port(), timeout, pickle.dumps((function, args))))
        for pipe in self.pipes:
            pipe.send_bytes(payload)
        answers = self._collect(timeout)
        self._signal(signal.SIGSTOP)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal. Between calls the processes are stopped, so that threads that poll take no time from tests."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def _collect(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Return (True, result) or (False, explanation) of every rank."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout + GRACE  # a rank that hangs writes its stacks at `timeout`
        while len(answers) < self.world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                answers[waiting[pipe]] = self._receive(waiting[pipe])
                if not answers[waiting[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                hung = set(range(self.world_size)) - set(answers)
                return answers | {rank: (False, "no answer; " + self._stacks(rank)) for rank in hung}
        return answers

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join(GRACE)
            return False, f"died with exit code {self.processes[rank].exitcode}; {self._stacks(rank)}"

    def _stacks(self, rank: int) -> str:
        self.logs[rank].seek(0)
        return "its stacks, if it wrote any:\n" + self.logs[rank].read()

    def _start(self) -> None:
        if self.processes:
            return
        context, engines, template = multiprocessing.get_context("spawn"), None, contextlib.nullcontext
        if FORKED:
            from tests.support.processes import forking  # not at the top: a spawned rank sets its environment first

            context, engines = multiprocessing.get_context("forkserver"), forking.engines.address
            template = forking.ranks.in_charge
        self.logs = [tempfile.NamedTemporaryFile("w+") for _ in range(self.world_size)]  # noqa: SIM115
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.world_size, self.logs[rank].name, dict(os.environ), engines)
            process = context.Process(target=_serve, args=arguments)  # no daemon: a rank may start an engine
            with template():
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        """End the processes; safe to call twice."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection, rank: int, world_size: int, log: str, environment: dict, engines: str | None) -> None:
    """Serve one call after the other, in an environment like that of `deepspeed --num_gpus N`."""
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    stacks = Path(log).open("w")  # noqa: SIM115 - open until the process ends
    faulthandler.enable(stacks)
    if engines is not None:
        from tests.support.processes.forking import fork_engines

        fork_engines(engines)
    while True:
        try:
            port, timeout, work = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        faulthandler.dump_traceback_later(timeout, file=stacks)
        try:
            function, args = pickle.loads(work)
            answer = True, function(*args)
        except BaseException:  # the parent reports it
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))
        _destroy_engines()
        _destroy_process_group()


def _destroy_engines() -> None:
    """Destroy DeepSpeed engines: backward hooks refer to them and their groups where garbage collection cannot look."""
    if "deepspeed" in sys.modules:
        from deepspeed import DeepSpeedEngine

        for engine in [thing for thing in gc.get_objects() if type(thing) is DeepSpeedEngine]:
            with contextlib.suppress(AssertionError):  # hooks are removed first; then a group may be missing
                engine.destroy()
        gc.collect()


def _destroy_process_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
