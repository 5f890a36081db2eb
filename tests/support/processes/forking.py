"""Processes that begin with their libraries imported: forked from a template, one of each kind a pytest process.

Imports are most of what starting a process takes: 7 of an engine's 10 seconds, all of a rank's. A template has done
them and nothing else, so it has one thread and no state: what is forked from it goes on as a spawned process would.
What tests start by a command (launchers, tools) begins as it does for users, and so does an engine within `spawned`,
or one with a setting that sglang reads while it is imported.
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
    """A fork server that has imported `preload`. `address` may go to other processes, whose children it forks too."""

    def __init__(self, preload: str, environment: dict[str, str | None]):
        super().__init__()
        self.set_forkserver_preload([preload])
        self._environment = environment
        self._ready = False

    @property
    def address(self) -> str:
        """Where it listens. It may still be importing."""
        with environment_of(self._environment):
            self.ensure_running()
        return self._forkserver_address

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Within the block, which begins once it has imported all, multiprocessing's fork server is this one."""
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
    """The template at `address`, which another process started and looks after."""

    def __init__(self, address: str):
        super().__init__("", {})
        # A child is handed an end of the pipe by which a server knows whether it is still needed; here it is nobody's.
        self._forkserver_address, self._forkserver_alive_fd = address, os.pipe()[1]

    def ensure_running(self) -> None:
        """It is."""


# Of the variables in which `SGLangProcess` hands on settings, those that sglang reads once, while it is imported, but
# for SGLANG_FORCE_STREAM_INTERVAL, which `_Forked` takes up.
READ_AT_IMPORT = {"SGLANG_SIMULATE_ACC_LEN"}

# Python that an engine's scheduler runs before it brings in this package's plugin; see `planted`.
PLANT = "RESPEC_TEST_PLANT"

ranks = Template("tests.support.processes.preload_rank", {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
engines: Template = Template("tests.support.processes.preload_engine", workers.engine_environment("cpu", threads=1))


class _Forked:
    """A worker of the engine that finds the environment it would have inherited, and ends with who asked for it."""

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
        exec(os.environ.get(PLANT, ""), {})  # noqa: S102 - a test's own
        super().__call__(*args)


class ForkedDetokenizer(_Forked, workers.DetokenizerWorker):
    pass


@contextlib.contextmanager
def _side_effects_undone() -> Iterator[None]:
    """sglang asks for spawned processes, once the environment is the engine's."""
    set_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        forks = method == "spawn" and READ_AT_IMPORT.isdisjoint(os.environ)
        set_method("forkserver" if forks else method, force)

    with side_effects_undone(), mock.patch.object(multiprocessing, "set_start_method", fork), engines.in_charge():
        yield


def fork_engines(address: str | None = None) -> None:
    """From now on the engines of this process are forked, from the template at `address` or from this process's own."""
    global engines
    if address is not None:
        engines = OthersTemplate(address)
    process.side_effects_undone = _side_effects_undone
    workers.SchedulerWorker, workers.DetokenizerWorker = ForkedScheduler, ForkedDetokenizer


@contextlib.contextmanager
def planted(code: str) -> Iterator[None]:
    """Engines that are started within the block run `code` first, in their scheduler: for faults, and to listen."""
    with mock.patch.dict(os.environ, {PLANT: code}):
        yield


@contextlib.contextmanager
def spawned() -> Iterator[None]:
    """Within the block an engine's processes begin from nothing."""
    originals = (side_effects_undone, *ForkedScheduler.__bases__[1:], *ForkedDetokenizer.__bases__[1:])
    with (
        mock.patch.object(process, "side_effects_undone", originals[0]),
        mock.patch.object(workers, "SchedulerWorker", originals[1]),
        mock.patch.object(workers, "DetokenizerWorker", originals[2]),
    ):
        yield
