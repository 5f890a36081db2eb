"""Drafting a chain without a GPU: the drafter's steps in one loop.

sglang builds a batch, runs its model runner and its logits processor for every draft step. For a one-layer drafter that
is most of the time; here a step is the layer, the head and an argmax. Trees go sglang's way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from respec_trainer.rollout.sglang_cpu_models import Context, drafter_step, is_plain


def draft_chain(original, worker, forward_batch):
    """Stands for EagleDraftWorker.draft_forward: (parents, candidate numbers, draft tokens [B, steps], None)."""
    from sglang.srt.runtime_context import get_spec

    head = worker.draft_runner.model
    batch = forward_batch.batch_size
    simple = worker.topk == 1 and batch <= len(worker._topk1_parents_prealloc) and is_plain(head.model)
    if not simple or forward_batch.forward_mode.is_idle() or get_spec().speculative_use_rejection_sampling:
        return original(worker, forward_batch)
    steps, spec = worker.speculative_num_steps, forward_batch.spec_info
    to_target = worker.hot_token_id  # the drafter's vocabulary in the target's numbers; None where they are the same
    tokens, features, positions = spec.topk_index, spec.hidden_states, forward_batch.positions
    tokens = tokens if to_target is None else to_target[tokens]
    cache_locs = forward_batch.out_cache_loc.view(batch, steps)
    vocabulary, weight = head.logits_processor.config.vocab_size, head.lm_head.weight
    chain = [tokens]
    for step, backend in enumerate(worker.draft_attn_backend.attn_backends):
        context = Context(head.model, positions + step, forward_batch, backend, cache_locs[:, step], features.dtype)
        hidden, features = drafter_step(head.model, chain[-1].flatten(), features, context)
        tokens = F.linear(hidden, weight)[:, :vocabulary].argmax(-1, keepdim=True)
        chain.append(tokens if to_target is None else to_target[tokens])
    parents, candidates = worker._topk1_parents_prealloc[:batch], worker._topk1_score_indices_prealloc[:batch]
    return parents, candidates, torch.cat(chain, 1), None
