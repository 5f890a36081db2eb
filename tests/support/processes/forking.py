"""Processes that start with their libraries imported: they are forked from a template, of which each kind has one.

Imports take most of the time of a start: 7 of an engine's 10 seconds, all of a rank's. A template has done its imports
and nothing else, so it has one thread and no state, and a process forked from it does the same as a spawned one.
Processes that tests start by a command (launchers, tools) start as they do for users. So does an engine within
`spawned`, or one with a setting that sglang reads on import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from typing import Any
from unittest import mock

from respec_trainer.rollout.sglang import process, workers
from respec_trainer.rollout.sglang.isolation import environment_of, side_effects_undone


class Template(ForkServer):
    """A fork server that has imported `preload`. Other processes may use it as well, by its `address`."""

    def __init__(self, preload: str, environment: dict[str, str | None]):
        super().__init__()
        self.set_forkserver_preload([preload])
        self._environment = environment
        self._ready = False

    @property
    def address(self) -> str:
        """The address at which the server listens. It may still be importing."""
        with environment_of(self._environment):
            self.ensure_running()
        return self._forkserver_address

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Replace multiprocessing's fork server by this one within the block, which begins after the imports."""
        assert self.address
        with mock.patch.object(forkserver, "connect_to_new_process", self.connect_to_new_process):
            if not self._ready:
                first = multiprocessing.get_context("forkserver").Process(target=os.getpid)
                first.start()
                first.join()
                assert first.exitcode == 0, "a template failed; its own messages are above"
                self._ready = True
            yield


class OthersTemplate(Template):
    """The template at `address`, which another process started and will end."""

    def __init__(self, address: str):
        super().__init__("", {})
        # Each child gets an end of a pipe by which its server detects that it is not needed. No server reads this pipe.
        self._forkserver_address, self._forkserver_alive_fd = address, os.pipe()[1]

    def ensure_running(self) -> None:
        """Do nothing: the template runs already."""


# The variables by which `SGLangProcess` passes settings to sglang, and which sglang reads only on import.
# SGLANG_FORCE_STREAM_INTERVAL is another one, but `_Forked` sets its value again.
READ_AT_IMPORT = {"SGLANG_SIMULATE_ACC_LEN"}

# Python code that an engine's scheduler runs before it loads this package's plugin; see `planted`.
PLANT = "RESPEC_TEST_PLANT"

ranks = Template("tests.support.processes.preload_rank", {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
engines: Template = Template("tests.support.processes.preload_engine", workers.engine_environment("cpu", threads=1))


class _Forked:
    """A worker of an engine. It gets the environment of the process that started the engine, and ends with it."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"environment": dict(os.environ)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import torch

        os.environ.clear()
        os.environ.update(state.pop("environment"))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        super().__setstate__(state)
        from sglang.srt.environ import envs
        from sglang.srt.managers.scheduler_components import output_streamer

        output_streamer.DEFAULT_FORCE_STREAM_INTERVAL = envs.SGLANG_FORCE_STREAM_INTERVAL.get()

    def __call__(self, *args: Any) -> None:
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
        super().__call__(*args)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


class ForkedScheduler(_Forked, workers.SchedulerWorker):
    def __call__(self, *args: Any) -> None:
        exec(os.environ.get(PLANT, ""), {})  # noqa: S102 - the code of a test
        super().__call__(*args)


class ForkedDetokenizer(_Forked, workers.DetokenizerWorker):
    pass


@contextlib.contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Fork the engine's processes within the block. sglang asks for spawned ones, after the environment is set."""
    set_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        forks = method == "spawn" and READ_AT_IMPORT.isdisjoint(os.environ)
        set_method("forkserver" if forks else method, force)

    with side_effects_undone(), mock.patch.object(multiprocessing, "set_start_method", fork), engines.in_charge():
        yield


def fork_engines(address: str | None = None) -> None:
    """Fork this process's engines from now on: from the template at `address`, or from the process's own."""
    global engines
    if address is not None:
        engines = OthersTemplate(address)
    process.side_effects_undone = _side_effects_undone
    workers.SchedulerWorker, workers.DetokenizerWorker = ForkedScheduler, ForkedDetokenizer


@contextlib.contextmanager
def planted(code: str) -> Iterator[None]:
    """Let engines that start within the block run `code` first in their scheduler, to plant faults or to record."""
    with mock.patch.dict(os.environ, {PLANT: code}):
        yield


@contextlib.contextmanager
def spawned() -> Iterator[None]:
    """Spawn the processes of engines that start within the block, without a template."""
    originals = (side_effects_undone, *ForkedScheduler.__bases__[1:], *ForkedDetokenizer.__bases__[1:])
    with (
        mock.patch.object(process, "side_effects_undone", originals[0]),
        mock.patch.object(workers, "SchedulerWorker", originals[1]),
        mock.patch.object(workers, "DetokenizerWorker", originals[2]),
    ):
        yield
