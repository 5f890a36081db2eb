"""Drafting of chains without a GPU, with little besides the drafter's passes.

For each pass sglang makes a batch and sends it through its model runner and logits processor, which takes most of the
time of a one-layer drafter. Here a pass is only the layer, the head and an argmax. Trees use sglang's own code.

Shapes: B requests, n tokens verified a request, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sgl_kernel.attention import plan_decode

from respec_trainer.rollout.sglang.inside.cpu.forward import Context, drafter_step, is_plain


def draft_chain(original, worker, forward_batch):
    """Replace EagleDraftWorker.draft_forward: return (parents, candidate numbers, draft tokens [B, steps], None)."""
    batch = forward_batch.batch_size
    if not is_simple(worker, forward_batch) or batch > len(worker._topk1_parents_prealloc):
        return original(worker, forward_batch)
    model, spec = worker.draft_runner.model.model, forward_batch.spec_info
    tokens, features = spec.topk_index, spec.hidden_states
    chain = [tokens if worker.hot_token_id is None else worker.hot_token_id[tokens]]
    cache_locs = forward_batch.out_cache_loc.view(batch, worker.speculative_num_steps)
    drafting = worker.draft_attn_backend  # None for one step, whose draft comes with the features
    for step, backend in enumerate(drafting.attn_backends if drafting else ()):
        req_to_token, seq_lens, slots = backend.draft_decode_metadata
        plan = plan_decode(req_to_token, slots, seq_lens)
        positions = forward_batch.positions + step
        context = Context(model, positions, plan, backend.token_to_kv_pool, cache_locs[:, step])
        hidden, features = drafter_step(model, chain[-1].flatten(), features, context)
        tokens = _likeliest(worker, hidden)
        chain.append(tokens if worker.hot_token_id is None else worker.hot_token_id[tokens])
    parents, candidates = worker._topk1_parents_prealloc[:batch], worker._topk1_score_indices_prealloc[:batch]
    return parents, candidates, torch.cat(chain, 1), None


def read_prompts(original, worker, batch, features, next_tokens, mm_input_embeds=None):
    """Replace EagleDraftWorker._draft_extend_for_prefill: the drafter reads prompts, or its backlog.

    Every token gets a key and a value, but the rest of the layer runs only for the last token of each request: with one
    layer, no other token's output is used.
    """
    if mm_input_embeds is not None or not is_simple(worker, batch):
        return original(worker, batch, features, next_tokens, mm_input_embeds)
    from sglang.srt.speculative.eagle_info import EagleDraftInput
    from sglang.srt.speculative.eagle_utils import _eagle_prefill_tail_tokens

    first, counts = torch.tensor(batch.prefix_lens), torch.tensor(batch.extend_lens)
    ends = counts.cumsum(0)
    positions = torch.arange(int(ends[-1])) + (first - ends + counts).repeat_interleave(counts)
    tokens = batch.input_ids.roll(-1)
    tokens[ends - 1] = _eagle_prefill_tail_tokens(batch, next_tokens).to(tokens.dtype)
    draft, features = _read(worker, batch, tokens, features, positions, first + counts, ends - 1)
    return EagleDraftInput(
        topk_p=torch.ones(len(counts), 1),
        topk_index=draft,
        hidden_states=features,
        bonus_tokens=next_tokens,
        num_tokens_per_req=1,
        num_tokens_for_logprob_per_req=1,
    )


def read_verified(original, worker, batch, result) -> None:
    """Replace EagleDraftWorker._draft_extend_for_decode: the drafter reads verified tokens, as in `read_prompts`."""
    if not is_simple(worker, batch):
        return original(worker, batch, result)
    n, count, lens = worker.speculative_num_draft_tokens, len(batch.seq_lens), batch.seq_lens  # before this pass
    wanted = torch.arange(0, count * n, n) + result.accept_lens - 1
    positions = (lens[:, None] + torch.arange(n)).flatten()
    tokens, features = result.next_token_ids.long(), result.logits_output.hidden_states
    draft = result.next_draft_input
    draft.topk_index, draft.hidden_states = _read(
        worker, batch, tokens, features, positions, lens + result.accept_lens, wanted
    )
    draft.topk_p = torch.ones(count, 1)
    draft.cuda_graph_compatible = True
    return None


def _read(worker, batch, tokens, features, positions, ends, wanted) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the drafter over `tokens` [T] with the target's `features` [T, 3H] of the preceding tokens.

    ends: [B] number of positions that each request's last token attends to. wanted: [B] that token's index in T.
    Return the next draft [B, 1] and its features [B, H].
    """
    runner = worker.draft_runner
    plan = plan_decode(worker.req_to_token_pool.req_to_token, batch.req_pool_indices, ends)
    context = Context(runner.model.model, positions, plan, runner.token_to_kv_pool, batch.out_cache_loc, wanted)
    hidden, features = drafter_step(runner.model.model, tokens, features, context)
    return _likeliest(worker, hidden), features


def is_simple(worker, batch) -> bool:
    """Return whether the functions above can serve the batch: greedy chains of a plain EAGLE-3 drafter."""
    from sglang.srt.runtime_context import get_spec

    if not worker.speculative_algorithm.is_eagle3():
        return False
    one_branch = worker.topk == 1 and not get_spec().speculative_use_rejection_sampling
    return one_branch and not batch.forward_mode.is_idle() and is_plain(worker.draft_runner.model.model)


def _likeliest(worker, hidden) -> torch.Tensor:
    """Return the drafter's most probable token [B, 1] after hidden [B, H], in its own vocabulary."""
    head = worker.draft_runner.model
    logits = F.linear(hidden, head.lm_head.weight)[:, : head.logits_processor.config.vocab_size]
    return logits.argmax(-1, keepdim=True)
