"""What this package changes inside sglang's scheduler, as a plugin of its entry-point group `sglang.srt.plugins`.

- On a CPU, stock sglang verifies drafts greedily at any temperature, which bends the policy in silence. Here
  verification is greedy only where every request of the batch is.
- On a CPU, dense decoders and their drafters take short forward passes (`sglang_cpu_models`, `sglang_cpu_drafting`).
- Requests may carry seeds without sglang's deterministic mode, which CPU backends do not have.

sglang calls `activate` in every process that loads plugins, for anybody who has this package installed. It acts only in
the schedulers of this package's own engine, which set SETTINGS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from respec_trainer.compat.versions import require_version
from respec_trainer.errors import EngineError

SETTINGS = "RESPEC_ENGINE_PLUGIN"

# What `activate` hooked; None until it is through. sglang only logs a plugin that failed and a hook that it could not
# apply, so `require_active` looks.
_hooked: list[str] | None = None


def plugin_settings(device: str, seeded: bool) -> str:
    return json.dumps({"device": device, "seeded": seeded})


def activate() -> None:
    """Entry point: register this package's hooks, in this package's engine only."""
    global _hooked
    if SETTINGS not in os.environ:
        return
    require_version("sglang", "0.5.21", "respec_trainer.rollout.sglang_plugin")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    settings = json.loads(os.environ[SETTINGS])
    hooks = _cpu_hooks() if settings["device"] == "cpu" else {}
    if settings["seeded"]:
        batch = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
        hooks[f"{batch}.from_schedule_batch"] = (_with_seeds, "AFTER")
    for target, (function, kind) in hooks.items():
        HookRegistry.register(target, function, HookType[kind])
    _hooked = list(hooks)


def require_active() -> None:
    """Raise EngineError unless `activate` ran here and every hook it registered is in place."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if _hooked is None:
        raise EngineError(
            "sglang did not load respec_trainer's plugin; install the package (pip install -e .), and name "
            "respec_trainer in SGLANG_PLUGINS if that is set"
        )
    missing = [target for target in _hooked if target not in HookRegistry._patched]
    if missing:
        raise EngineError(f"sglang did not apply respec_trainer's hooks on {', '.join(missing)}; see its log above")


def _cpu_hooks() -> dict[str, tuple[Callable, str]]:
    """Target -> (function, kind of hook)."""
    from respec_trainer.rollout.sglang_cpu_drafting import catch_up, draft_chain
    from respec_trainer.rollout.sglang_cpu_models import drafter_forward, target_forward

    srt = "sglang.srt"
    worker = f"{srt}.speculative.eagle_worker_v2.EagleDraftWorker"
    return {
        f"{srt}.speculative.eagle_utils._verify_uses_greedy": (_verify_uses_greedy, "REPLACE"),
        f"{srt}.model_executor.forward_batch_info.compute_position_torch": (_compute_position, "REPLACE"),
        f"{srt}.models.qwen2.Qwen2Model.forward": (target_forward, "AROUND"),
        f"{srt}.models.qwen3.Qwen3Model.forward": (target_forward, "AROUND"),
        f"{srt}.models.llama.LlamaModel.forward": (target_forward, "AROUND"),
        f"{srt}.models.llama_eagle3.LlamaModel.forward": (drafter_forward, "AROUND"),
        f"{worker}.draft_forward": (draft_chain, "AROUND"),
        f"{worker}._draft_extend_for_decode": (catch_up, "AROUND"),
    }


def _verify_uses_greedy(*, is_all_greedy: bool, **_kwargs) -> bool:
    return is_all_greedy


def _compute_position(extend_prefix_lens, extend_seq_lens):
    """(position of every new token, first token of every request); sglang's own makes one tensor a request."""
    import torch

    start = extend_seq_lens.cumsum(0) - extend_seq_lens
    owner = torch.repeat_interleave(extend_seq_lens.long())
    positions = torch.arange(owner.numel()) + (extend_prefix_lens - start).long()[owner]
    return positions, start.to(extend_seq_lens.dtype)


def _with_seeds(info, _cls, batch, *_args, **_kwargs):
    """Give the batch its requests' seeds; the engine puts one into every request."""
    import torch

    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info
