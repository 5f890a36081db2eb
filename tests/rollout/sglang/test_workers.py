"""rollout/sglang/workers.py and inside/plugin.py: effects in sglang's processes, and none elsewhere."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from respec_trainer.errors import EngineError, UnsupportedVersionError
from respec_trainer.rollout.plugin_contract import SETTINGS, plugin_settings
from respec_trainer.rollout.sglang import workers
from respec_trainer.rollout.sglang.inside import plugin
from tests.support.processes.forking import spawned


@pytest.fixture(autouse=True)
def workers_of_runs():
    """Use the workers of runs, which integration tests may have replaced."""
    with spawned():
        yield


def run(code: str, **environment: str | None) -> str:
    """Run Python code in a new process; return its standard output."""
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=changed, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_engine_processes_are_no_ranks_of_the_trainer():
    changes = workers.engine_environment("cpu", threads=3)
    assert all(changes[name] is None for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"))
    assert changes["OMP_NUM_THREADS"] == "3" and changes["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in workers.engine_environment("cuda", threads=3)


def test_a_users_environment_does_not_change_what_log_probs_and_acceptance_mean():
    for device in "cpu", "cuda":
        changes = workers.engine_environment(device, threads=3)
        assert changes["SGLANG_RETURN_ORIGINAL_LOGPROB"] is None and changes["SGLANG_SIMULATE_ACC_LEN"] is None


def test_ranks_of_an_engine_are_not_bound_to_numa_nodes():
    binding = "SGLANG_CPU_OMP_THREADS_BIND"
    assert binding not in workers.engine_environment("cpu", threads=3)
    assert workers.engine_environment("cpu", threads=3, tp=3)[binding].count("|") == 2
    assert binding not in workers.engine_environment("cuda", threads=3, tp=3)


def test_a_process_is_prepared_while_its_worker_is_unpickled():
    """A worker prepares its process before its arguments, which are of sglang's classes, are unpickled."""
    worker = pickle.dumps(workers.SchedulerWorker("cpu", "{}"))
    code = f"""
import pickle, signal, sys
pickle.loads({worker!r})
assert "sglang" not in sys.modules
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
import torch, torchvision, sgl_kernel
print(sgl_kernel.__file__)
"""
    assert run(code).endswith("rollout/sglang/inside/cpu/stand_in/sgl_kernel/__init__.py")


def test_a_child_that_fails_exits_and_leaves_its_parent_alone():
    code = """
import os, psutil, signal
from respec_trainer.rollout.sglang.workers import FAILED, exit_instead_of_signalling
signal.signal(signal.SIGQUIT, lambda *_: print("hit"))
child = os.fork()
if child == 0:
    exit_instead_of_signalling()
    psutil.Process().parent().send_signal(signal.SIGQUIT)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == FAILED
print("alive")
"""
    assert run(code) == "alive"


def test_another_sglang_is_refused(monkeypatch):
    workers.prepare_process("cpu")  # a refusal must not leave sglang half imported for later tests
    monkeypatch.setattr("respec_trainer.compat.versions.version", lambda _: "0.5.22")
    with pytest.raises(UnsupportedVersionError, match=r"sglang 0\.5\.22 is installed, but sglang==0\.5\.21"):
        workers.prepare_process("cpu")
    monkeypatch.setenv(SETTINGS, plugin_settings("cpu", False))
    with pytest.raises(UnsupportedVersionError, match="inside.plugin"):
        plugin.activate()
    with pytest.raises(EngineError, match="did not load"):
        plugin.require_active()


def test_the_plugin_is_an_entry_point_of_sglang():
    (ours,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "respec_trainer"]
    assert ours.load() is plugin.activate


def test_the_plugin_does_nothing_to_other_users_of_sglang():
    code = """
from respec_trainer.rollout.sglang.workers import prepare_process
prepare_process("cpu")
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
print(dict(HookRegistry._hooks))
"""
    assert run(code, RESPEC_ENGINE_PLUGIN=None) == "{}"


def test_a_scheduler_without_the_plugin_does_not_start(monkeypatch):
    monkeypatch.setattr(plugin, "hooked", None)
    with pytest.raises(EngineError, match="SGLANG_PLUGINS"):
        plugin.require_active()
    monkeypatch.setattr(plugin, "hooked", ["sglang.no.such.function"])
    with pytest.raises(EngineError, match=r"hooks on sglang\.no\.such\.function"):
        plugin.require_active()
