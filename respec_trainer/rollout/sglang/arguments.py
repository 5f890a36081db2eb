"""Translation of EngineSettings to sglang's arguments and environment variables."""

from __future__ import annotations

import atexit
import json
import tempfile
from pathlib import Path
from typing import Any

from respec_trainer.config import EngineConfig
from respec_trainer.dtypes import DTYPES, long_name
from respec_trainer.errors import ConfigError
from respec_trainer.network import free_port
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.speculation.algorithms import algorithm_of, changes_depth, names_of


def server_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Return keyword arguments for the ServerArgs of sglang 0.5.21."""
    engine = settings.engine
    arguments: dict[str, Any] = {
        "model_path": settings.model_path,
        "dtype": long_name(DTYPES[settings.dtype]),
        "device": settings.device,
        "load_format": settings.load_format,
        "context_length": settings.context_length,
        "tp_size": engine.tp,
        "base_gpu_id": settings.base_gpu_id,
        "random_seed": settings.seed,
        "max_running_requests": engine.max_running_requests,
        "max_total_tokens": engine.max_total_tokens,
        "mem_fraction_static": engine.mem_fraction,
        "log_level": engine.log_level,
        "watchdog_timeout": engine.timeout,
        "skip_tokenizer_init": not settings.tokenizer,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        # The samples of a group share the computation of their prompt. Every weight update empties the prefix cache.
        "disable_radix_cache": False,
        # In the order given: searching the waiting requests for the best prefix costs more than it gains.
        "schedule_policy": "fcfs",
        "min_free_slots_delay": engine.min_free_slots,
        # An idle engine must not poll, because the trainer needs the cores.
        "sleep_on_idle": True,
        "weight_version": settings.actor_version,
        # sglang would choose a port seconds before its scheduler listens, and another connection could take it.
        "nccl_port": free_port(),
    }
    arguments |= _cpu_arguments() if settings.device == "cpu" else _gpu_arguments(engine)
    if settings.speculative:
        arguments |= _speculation_arguments(settings)
        if settings.steps_by_batch:
            arguments |= _switching_arguments(settings.steps_by_batch)
    if settings.steps is not None:
        arguments |= _changing_arguments(settings, settings.steps)
    return arguments


def step_environment(steps: DepthSettings | None) -> dict[str, str]:
    """Return environment variables of the engine's processes, which make sglang call what `DraftDepth` hooks."""
    if steps is None:
        return {}
    environment = {"SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND": "1"}
    if steps.simulated_accept_length is not None:
        environment["SGLANG_SIMULATE_ACC_LEN"] = "1"  # any length enables the hook, which uses its own length
    return environment


def _cpu_arguments() -> dict[str, Any]:
    return {
        # The backends of the two phases are used. sglang would refuse intel_amx as attention_backend without AMX.
        "attention_backend": "torch_native",
        "prefill_attention_backend": "intel_amx",
        "decode_attention_backend": "intel_amx",
        "disable_cuda_graph": True,
        # Overlap hides the host's work behind the device's. On a CPU they are the same, and overlap would only make a
        # finished batch decode once more.
        "disable_overlap_schedule": True,
    }


def _gpu_arguments(engine: EngineConfig) -> dict[str, Any]:
    return {
        "attention_backend": "triton",
        "enable_memory_saver": True,
        # The memory saver cannot move the memory that a prefill graph holds.
        "cuda_graph_backend_prefill": "disabled",
        "cuda_graph_max_bs_decode": engine.max_running_requests,
    }


def _speculation_arguments(settings: EngineSettings) -> dict[str, Any]:
    shape, algorithm = settings.speculation, algorithm_of(settings.speculation)
    arguments = {
        "speculative_num_draft_tokens": shape.draft_tokens,
        # 1.0 is lossless. These are sglang's defaults, but the samples' distribution depends on them.
        "speculative_accept_threshold_single": shape.accept_threshold_single,
        "speculative_accept_threshold_acc": shape.accept_threshold_acc,
        "speculative_use_rejection_sampling": shape.rejection_sampling,
    }
    if algorithm.folder is not None:
        arguments |= {
            "speculative_draft_model_path": settings.drafter_path,
            "speculative_draft_attention_backend": "intel_amx" if settings.device == "cpu" else "triton",
        }
    return arguments | algorithm.server_arguments(shape)


def _changing_arguments(settings: EngineSettings, steps: DepthSettings) -> dict[str, Any]:
    """Return arguments that make sglang prepare 0 and every candidate, and size its buffers for the largest."""
    shape = settings.speculation
    if not changes_depth(shape):
        able = names_of("adapts")
        raise ConfigError(
            f"draft steps change in chains of {able} only: set speculation.algorithm={able} and speculation.topk=1, "
            f"not {shape.algorithm} and {shape.topk}, or speculation.policy=fixed"
        )
    if shape.rejection_sampling:
        raise ConfigError(
            "rejection sampling needs a draft that sglang does not keep while speculation is off: set "
            "speculation.rejection_sampling=false, or speculation.policy=fixed"
        )
    if settings.steps_by_batch:
        raise ConfigError(
            "draft steps change by sglang's table (steps_by_batch) or by DepthSettings (steps), not both: leave one out"
        )
    table = _table_arguments({"1": {"candidate_steps": sorted({0, *steps.candidates})}})
    return table | {"speculative_num_steps": steps.most, "speculative_num_draft_tokens": steps.most + 1}


def _switching_arguments(steps_by_batch: dict[int, int]) -> dict[str, Any]:
    return _table_arguments({str(batch): {"candidate_steps": [steps]} for batch, steps in steps_by_batch.items()})


def _table_arguments(table: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """Write sglang's table to a file, from which this process and its schedulers read it, and return the arguments."""
    with tempfile.NamedTemporaryFile("w", prefix="respec_steps_", suffix=".json", delete=False) as file:
        json.dump(table, file)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return {"speculative_adaptive": True, "speculative_adaptive_config": file.name}
