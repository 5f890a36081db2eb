"""Entry points of sglang's processes, which prepare them before any of sglang is imported there.

sglang starts its scheduler and detokenizer through two attributes of its Engine class. They are set to objects of this
module. A spawned process unpickles its target before the target's arguments, which are of sglang's own classes, so
unpickling the target prepares the process in time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from respec_trainer.processes import collect_garbage_again, collect_no_garbage, parent_death_signal

# sglang's children report failure by a signal that would end the trainer. They exit with this status instead, which the
# trainer's watcher thread detects.
FAILED = 70

# Environment variables of a launcher's ranks. The engine's processes are not ranks of the trainer's job.
LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK",
    "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip

# With these set, sglang would return log-probs at temperature 1, or accept drafts that the target did not choose.
OTHER_MEANING = (
    "SGLANG_RETURN_ORIGINAL_LOGPROB", "SGLANG_SIMULATE_ACC_LEN", "SGLANG_SIMULATE_ACC_METHOD",
    "SGLANG_SIMULATE_ACC_TOKEN_MODE",
)  # fmt: skip


def engine_environment(device: str, threads: int, tp: int = 1) -> dict[str, str | None]:
    """Return the environment of the engine's processes; None unsets a variable. On a CPU each rank has `threads`."""
    changes: dict[str, str | None] = dict.fromkeys((*LAUNCHER, *OTHER_MEANING))
    changes |= {
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    if device == "cpu":
        changes["OMP_NUM_THREADS"] = str(threads)
        changes["TORCHDYNAMO_DISABLE"] = "1"  # its first compilation takes 25 s and gains nothing
        # By default sglang refuses more ranks than NUMA nodes. The setting lists each rank's cores, which only AMX
        # kernels use.
        if tp > 1:
            changes["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(["all"] * tp)
    else:
        # CUDA IPC cannot share expandable segments, and the memory saver cannot release them.
        changes |= {"PYTORCH_CUDA_ALLOC_CONF": None, "PYTORCH_ALLOC_CONF": None}
    return changes


def prepare_process(device: str) -> None:
    """Make sglang importable in this process. Call it before importing sglang or transformers' model classes."""
    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
    from respec_trainer.compat.versions import require_version

    require_version("sglang", "0.5.21", "respec_trainer.rollout")
    define_torchvision_operators()
    # On a CPU sglang logs at import that it found no CUDA.
    logging.getLogger("sglang.kernels.jit.utils.arch").setLevel(logging.ERROR)
    if device == "cpu":
        from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

        put_stand_in_on_path()
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # sglang reads it once, at its first import


@dataclass
class Worker:
    """Target of one of sglang's processes; unpickling it prepares the process."""

    device: str
    plugin_settings: str  # for inside/plugin.py, JSON

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        collect_no_garbage()
        warnings.filterwarnings("ignore")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the trainer, which ends the engine
        parent_death_signal(signal.SIGKILL)()  # from the start, not only once sglang sets it
        prepare_process(self.device)
        exit_instead_of_signalling()


class SchedulerWorker(Worker):
    """Runs sglang's scheduler after checking that this package's plugin is active."""

    def __call__(self, *args: Any) -> None:
        from respec_trainer.rollout.plugin_contract import SETTINGS
        from respec_trainer.rollout.sglang.inside.plugin import require_active

        os.environ[SETTINGS] = self.plugin_settings
        from sglang.srt.managers.scheduler import run_scheduler_process
        from sglang.srt.model_loader import weight_utils
        from sglang.srt.plugins import load_plugins

        weight_utils.tqdm = weight_utils.DisabledTqdm  # its progress bars would disturb the trainer's display
        load_plugins()
        require_active()
        collect_garbage_again()
        run_scheduler_process(*args)


class DetokenizerWorker(Worker):
    """Runs sglang's detokenizer."""

    def __call__(self, *args: Any) -> None:
        from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

        collect_garbage_again()
        run_detokenizer_process(*args)


def exit_instead_of_signalling() -> None:
    """Make this process exit with status FAILED where it would signal its failure to its parent."""
    import psutil

    original = psutil.Process.send_signal

    def send_signal(process: psutil.Process, number: int) -> None:
        if number == signal.SIGQUIT and process.pid == os.getppid():
            sys.stderr.flush()
            os._exit(FAILED)
        original(process, number)

    psutil.Process.send_signal = send_signal
