"""Plugin that changes sglang's scheduler, of sglang's entry-point group `sglang.srt.plugins`.

- On a CPU, stock sglang verifies drafts greedily at any temperature, which silently changes the distribution of the
  samples. Here verification is greedy only if every request of the batch is.
- On a CPU, dense decoders and their drafters use shorter forward passes (`cpu/forward.py`, `cpu/drafting.py`).
- Requests may have seeds without sglang's deterministic mode, which CPU backends do not have.
- N-gram trees are padded with different tokens. sglang pads them with copies of token 0. Verification adds up the
  probabilities of a node's children, so it would accept that token once for each copy, which is too often.
- Log-probs are of the distribution that top_k and top_p leave (`truncation.py`).
- Every response token is returned with its origin: an accepted draft, or a draw by the target.
- Draft steps may change while the engine runs (`draft_depth.py`).

sglang calls `activate` in every process that loads plugins, wherever this package is installed. It has an effect only
in the schedulers of this package's own engine, where SETTINGS is set.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from respec_trainer.compat.versions import require_version
from respec_trainer.errors import EngineError
from respec_trainer.models.registry import FAMILIES
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.plugin_contract import ORIGINS, SETTINGS
from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED

# Targets that `activate` hooked; None until it has finished. sglang only logs a plugin that failed and a hook that it
# could not apply, so `require_active` checks both.
hooked: list[str] | None = None


Hooks = dict[str, tuple[Callable, str]]  # target -> (function, kind of hook)


def activate() -> None:
    """Register this package's hooks, in this package's engine only; sglang's entry point."""
    global hooked
    if SETTINGS not in os.environ:
        return
    require_version("sglang", "0.5.21", "respec_trainer.rollout.sglang.inside.plugin")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from respec_trainer.rollout.sglang.inside.digest import digest_hooks
    from respec_trainer.rollout.sglang.inside.truncation import truncation_hooks

    settings = json.loads(os.environ[SETTINGS])
    hooks = _cpu_hooks() if settings["device"] == "cpu" else {}
    processor = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    hooks[f"{processor}._resolve_spec_v2_tokens"] = (with_origins, "AROUND")
    hooks["sglang.srt.managers.schedule_batch.Req.update_finish_state"] = (note_prefill, "BEFORE")
    hooks["sglang.srt.speculative.ngram_worker.NGRAMWorker._prepare_draft_tokens"] = (with_distinct_drafts, "AFTER")
    hooks |= digest_hooks()
    if settings["truncated_logprobs"]:
        hooks |= truncation_hooks()
    if settings["seeded"]:
        batch = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
        hooks[f"{batch}.from_schedule_batch"] = (_with_seeds, "AFTER")
    if settings["steps"]:
        from respec_trainer.rollout.sglang.inside.draft_depth import DraftDepth

        hooks = outside(DraftDepth(DepthSettings.of_json(settings["steps"]), settings["device"]).hooks(), hooks)
    for target, (function, kind) in hooks.items():
        HookRegistry.register(target, function, HookType[kind])
    hooked = list(hooks)


def require_active() -> None:
    """Raise EngineError unless `activate` ran here and every hook it registered is in place."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if hooked is None:
        raise EngineError(
            "sglang did not load respec_trainer's plugin; install the package (pip install -e .), and name "
            "respec_trainer in SGLANG_PLUGINS if that is set"
        )
    missing = [target for target in hooked if target not in HookRegistry._patched]
    if missing:
        raise EngineError(f"sglang did not apply respec_trainer's hooks on {', '.join(missing)}; see its log above")


def outside(outer: Hooks, inner: Hooks) -> Hooks:
    """Join hooks; where both have a target, whose hooks must be AROUND, the outer function wraps the inner one."""
    both = inner | outer
    for target in inner.keys() & outer.keys():
        (wrap, _), (wrapped, _) = outer[target], inner[target]
        both[target] = (functools.partial(_around, wrap, wrapped), "AROUND")
    return both


def _around(wrap: Callable, wrapped: Callable, original: Callable, *args: Any, **kwargs: Any) -> Any:
    return wrap(functools.partial(wrapped, original), *args, **kwargs)


def _cpu_hooks() -> Hooks:
    from sgl_kernel.sampling import chain_speculative_sampling

    from respec_trainer.rollout.sglang.inside.cpu.drafting import draft_chain, read_prompts, read_verified
    from respec_trainer.rollout.sglang.inside.cpu.forward import drafter_forward, target_forward

    srt = "sglang.srt"
    worker = f"{srt}.speculative.eagle_worker_v2.EagleDraftWorker"
    rejection = "sglang.kernels.ops.speculative.reject_sampling.chain_speculative_sampling_triton"
    return {
        f"{srt}.speculative.eagle_utils._verify_uses_greedy": (verify_uses_greedy, "REPLACE"),
        rejection: (chain_speculative_sampling, "REPLACE"),
        f"{srt}.model_executor.forward_batch_info.compute_position_torch": (_compute_position, "REPLACE"),
        **{f"{model}.forward": (target_forward, "AROUND") for model in _target_models()},
        f"{srt}.models.llama_eagle3.LlamaModel.forward": (drafter_forward, "AROUND"),
        f"{worker}.draft_forward": (draft_chain, "AROUND"),
        f"{worker}._draft_extend_for_prefill": (read_prompts, "AROUND"),
        f"{worker}._draft_extend_for_decode": (read_verified, "AROUND"),
    }


def _target_models() -> list[str]:
    """Return the classes of sglang that a target model may have."""
    return [model for name in FAMILIES for model in FAMILIES[name].engine_models]


def verify_uses_greedy(*, is_all_greedy: bool, **_kwargs) -> bool:
    """Return whether to verify a batch greedily: only if all of its requests are greedy, on a CPU too."""
    return is_all_greedy


def _compute_position(extend_prefix_lens, extend_seq_lens):
    """Return (position of every new token, first token of every request), without sglang's tensor for each request."""
    import torch

    start = extend_seq_lens.cumsum(0) - extend_seq_lens
    owner = torch.repeat_interleave(extend_seq_lens.long())
    positions = torch.arange(owner.numel()) + (extend_prefix_lens - start).long()[owner]
    return positions, start.to(extend_seq_lens.dtype)


def with_distinct_drafts(result, worker, _batch):
    """Return (drafts [B * n], mask [B * n * n]) with no token twice among a root's children, padding included."""
    import numpy as np

    drafts, mask = result
    n = worker.draft_token_num
    for tokens, tree in zip(drafts.reshape(-1, n), mask.reshape(-1, n, n), strict=True):
        # Children of the root attend to the root and themselves. sglang's padding is the last of them.
        children = np.flatnonzero(tree.sum(1) == 2)
        _, first = np.unique(tokens[children], return_index=True)
        copies = np.delete(children, first)
        unused = np.setdiff1d(np.arange(2 * n), tokens[children])
        tokens[copies] = unused[: len(copies)]
    return drafts, mask


def with_origins(original, processor, result, batch):
    """Record the origin of each token of a verify pass; sglang sends such lists together with the tokens."""
    runs = original(processor, result, batch)
    drafted = (result.speculative_output_stride or result.speculative_num_draft_tokens) > 1
    for request, run in zip(batch.reqs, runs, strict=True):
        if request.is_retracted or request.finished() or not run:
            continue  # sglang discards these tokens
        origins = _origins(request)  # the run is not among the request's tokens yet
        origins += [ACCEPTED] * (len(run) - 1) + [BONUS if drafted else UNDRAFTED]
    return runs


def note_prefill(request, *_args, **_kwargs) -> None:
    """Record the first token of a prompt, or after a retraction: it has no verify pass and may be sent at once."""
    from sglang.srt.runtime_context import get_spec

    if get_spec().speculative_algorithm is not None:
        _origins(request)


def _origins(request) -> list[int]:
    """Return the request's list of origins, padded to the number of its tokens: sglang sends the same slice of both."""
    request.customized_info = request.customized_info or {}
    origins = request.customized_info.setdefault(ORIGINS, [])
    origins += [UNDRAFTED] * (len(request.output_ids) - len(origins))
    return origins


def _with_seeds(info, _cls, batch, *_args, **_kwargs):
    """Set the batch's seeds from its requests, which all have one."""
    import torch

    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info
