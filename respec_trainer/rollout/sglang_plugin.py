"""What this package changes inside sglang's scheduler, as a plugin of its entry-point group `sglang.srt.plugins`.

- On a CPU, stock sglang verifies drafts greedily at any temperature, which bends the policy in silence. Here
  verification is greedy only where every request of the batch is.
- Requests may carry seeds without sglang's deterministic mode, which CPU backends do not have.

sglang calls `activate` in every process that loads plugins, for anybody who has this package installed. It acts only in
the schedulers of this package's own engine, which set SETTINGS.
"""

from __future__ import annotations

import json
import os

from respec_trainer.compat.versions import require_version
from respec_trainer.errors import EngineError

SETTINGS = "RESPEC_ENGINE_PLUGIN"

# What `activate` hooked; None until it ran. sglang only logs a hook that it could not apply, so `require_active` looks.
_hooked: list[str] | None = None


def plugin_settings(device: str, seeded: bool) -> str:
    return json.dumps({"device": device, "seeded": seeded})


def activate() -> None:
    """Entry point: register this package's hooks, in this package's engine only."""
    global _hooked
    if SETTINGS not in os.environ:
        return
    _hooked = []
    require_version("sglang", "0.5.21", "respec_trainer.rollout.sglang_plugin")
    settings = json.loads(os.environ[SETTINGS])
    if settings["device"] == "cpu":
        _hook("sglang.srt.speculative.eagle_utils._verify_uses_greedy", _verify_uses_greedy, "REPLACE")
        _hook_cpu_models()
    if settings["seeded"]:
        _hook("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _with_seeds, "AFTER")


def _hook_cpu_models() -> None:
    from respec_trainer.rollout import sglang_cpu_drafting, sglang_cpu_models

    for model in ("qwen2.Qwen2Model", "qwen3.Qwen3Model", "llama.LlamaModel"):
        _hook(f"sglang.srt.models.{model}.forward", sglang_cpu_models.target_forward, "AROUND")
    _hook("sglang.srt.models.llama_eagle3.LlamaModel.forward", sglang_cpu_models.drafter_forward, "AROUND")
    _hook("sglang.srt.model_executor.forward_batch_info.compute_position_torch", _compute_position, "REPLACE")
    drafting = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft_forward"
    _hook(drafting, sglang_cpu_drafting.draft_chain, "AROUND")


def _compute_position(extend_prefix_lens, extend_seq_lens):
    """(position of every new token, first token of every request); sglang's own makes one tensor a request."""
    import torch

    start = extend_seq_lens.cumsum(0) - extend_seq_lens
    owner = torch.repeat_interleave(extend_seq_lens.long())
    positions = torch.arange(owner.numel()) + (extend_prefix_lens - start).long()[owner]
    return positions, start.to(extend_seq_lens.dtype)


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


def _hook(target: str, function, kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, function, HookType[kind])
    _hooked.append(target)


def _verify_uses_greedy(*, is_all_greedy: bool, **_kwargs) -> bool:
    return is_all_greedy


def _with_seeds(info, _cls, batch, *_args, **_kwargs):
    """Give the batch its requests' seeds; the engine puts one into every request."""
    import torch

    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info
