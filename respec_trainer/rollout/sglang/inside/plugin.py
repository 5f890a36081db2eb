"""What this package changes inside sglang's scheduler, as a plugin of its entry-point group `sglang.srt.plugins`.

- On a CPU, stock sglang verifies drafts greedily at any temperature, which bends the policy in silence. Here
  verification is greedy only where every request of the batch is.
- On a CPU, dense decoders and their drafters take short forward passes (`sglang_cpu_models`, `sglang_cpu_drafting`).
- Requests may carry seeds without sglang's deterministic mode, which CPU backends do not have.
- N-gram trees are filled up with different tokens. sglang fills them with copies of token 0, and verification, which
  adds up the mass of a node's children, would accept that token once for each copy, which bends the policy too.
- Every response token brings back where it came from: an accepted draft, or a draw of the target's own.
- Draft steps may change while the engine runs (`sglang_steps`).

sglang calls `activate` in every process that loads plugins, for anybody who has this package installed. It acts only in
the schedulers of this package's own engine, which set SETTINGS.
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

# What `activate` hooked; None until it is through. sglang only logs a plugin that failed and a hook that it could not
# apply, so `require_active` looks.
hooked: list[str] | None = None


Hooks = dict[str, tuple[Callable, str]]  # target -> (function, kind of hook)


def activate() -> None:
    """Entry point: register this package's hooks, in this package's engine only."""
    global hooked
    if SETTINGS not in os.environ:
        return
    require_version("sglang", "0.5.21", "respec_trainer.rollout.sglang.inside.plugin")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from respec_trainer.rollout.sglang.inside.digest import digest_hooks

    settings = json.loads(os.environ[SETTINGS])
    hooks = _cpu_hooks() if settings["device"] == "cpu" else {}
    processor = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    hooks[f"{processor}._resolve_spec_v2_tokens"] = (with_origins, "AROUND")
    hooks["sglang.srt.managers.schedule_batch.Req.update_finish_state"] = (note_prefill, "BEFORE")
    hooks["sglang.srt.speculative.ngram_worker.NGRAMWorker._prepare_draft_tokens"] = (with_distinct_drafts, "AFTER")
    hooks |= digest_hooks()
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
    """Both; where they share a target, whose hooks must be AROUND, the outer function wraps the inner one."""
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
    """The classes of sglang's that a target may be of."""
    return [model for name in FAMILIES for model in FAMILIES[name].engine_models]


def verify_uses_greedy(*, is_all_greedy: bool, **_kwargs) -> bool:
    """Whether a batch is verified greedily: where all of its requests are greedy, and on a CPU too nowhere else."""
    return is_all_greedy


def _compute_position(extend_prefix_lens, extend_seq_lens):
    """(position of every new token, first token of every request); sglang's own makes one tensor a request."""
    import torch

    start = extend_seq_lens.cumsum(0) - extend_seq_lens
    owner = torch.repeat_interleave(extend_seq_lens.long())
    positions = torch.arange(owner.numel()) + (extend_prefix_lens - start).long()[owner]
    return positions, start.to(extend_seq_lens.dtype)


def with_distinct_drafts(result, worker, _batch):
    """(drafts [B * n], mask [B * n * n]) with no token twice below a root. Padding is below the root and last."""
    import numpy as np

    drafts, mask = result
    n = worker.draft_token_num
    for tokens, tree in zip(drafts.reshape(-1, n), mask.reshape(-1, n, n), strict=True):
        children = np.flatnonzero(tree.sum(1) == 2)  # they see the root and themselves
        _, first = np.unique(tokens[children], return_index=True)
        copies = np.delete(children, first)
        unused = np.setdiff1d(np.arange(2 * n), tokens[children])
        tokens[copies] = unused[: len(copies)]
    return drafts, mask


def with_origins(original, processor, result, batch):
    """Note where each token of a verify pass came from; sglang sends such lists along with the tokens."""
    runs = original(processor, result, batch)
    drafted = (result.speculative_output_stride or result.speculative_num_draft_tokens) > 1
    for request, run in zip(batch.reqs, runs, strict=True):
        if request.is_retracted or request.finished() or not run:
            continue  # sglang throws these tokens away
        origins = _origins(request)  # the run is not among the request's tokens yet
        origins += [ACCEPTED] * (len(run) - 1) + [BONUS if drafted else UNDRAFTED]
    return runs


def note_prefill(request, *_args, **_kwargs) -> None:
    """A prompt's first token, and one after a retraction, come without a verify pass, and may be sent at once."""
    from sglang.srt.runtime_context import get_spec

    if get_spec().speculative_algorithm is not None:
        _origins(request)


def _origins(request) -> list[int]:
    """The request's list, as long as its tokens are many: sglang sends the same part of both."""
    request.customized_info = request.customized_info or {}
    origins = request.customized_info.setdefault(ORIGINS, [])
    origins += [UNDRAFTED] * (len(request.output_ids) - len(origins))
    return origins


def _with_seeds(info, _cls, batch, *_args, **_kwargs):
    """Give the batch its requests' seeds; the engine puts one into every request."""
    import torch

    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info
