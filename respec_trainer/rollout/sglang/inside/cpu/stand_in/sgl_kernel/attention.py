"""Attention of new tokens over a paged KV cache.

Gather each request's cached rows into [B, L, K, D], padded to the longest request, and pass them to torch's
scaled_dot_product_attention. The rows to gather and the mask are the same for every layer of a forward pass, so they
are computed once, as a `Plan`. Two measures make the rest fast:

- The query heads that share a key head become rows of one query. torch's own grouped attention runs them one by one,
  which costs five times as much for few new tokens.
- Attention is computed in float32, which torch's kernel for short queries does faster than bfloat16, with conversion.

Shapes: B requests, T new tokens of all requests, n of one, L cached positions, A query heads, K key heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Above this many new tokens a request, merging heads would only make the mask larger.
FEW_QUERIES = 16


class Plan(NamedTuple):
    """Rows to gather and masks of one forward pass."""

    batch: int
    width: int  # new tokens of each request, padded to the largest number
    rows: torch.Tensor  # [B * L] cache rows, row 0 as padding
    mask: torch.Tensor | None  # added to the scores, one row for each query or one for all; None: no mask
    # Both None if no query is padded:
    token_of_query: torch.Tensor | None = None  # [B * width] index of each padded query's token
    query_of_token: torch.Tensor | None = None  # [T] index of each token's padded query


def plan_decode(req_to_token, req_pool_indices, seq_lens) -> Plan:
    """Plan a pass in which each request has one new token, the last of its `seq_lens` positions."""
    rows, inside = _cache_rows(req_to_token, req_pool_indices, seq_lens)
    mask = None if bool(inside.all()) else _as_scores(inside[:, None, None])
    return Plan(seq_lens.numel(), 1, rows, mask)


def plan_extend(req_to_token, req_pool_indices, seq_lens, extend_seq_lens, group: int, tree_mask=None) -> Plan:
    """Plan a pass in which the last `extend_seq_lens` of each request's `seq_lens` positions are new.

    group: query heads for each key head.
    tree_mask: bool [B * n * n], True where a new token (row) attends to another (column); None for causal attention.
    """
    width = int(extend_seq_lens.max())
    if width == 1:  # verification without drafts must cost no more than decoding
        return plan_decode(req_to_token, req_pool_indices, seq_lens)
    rows, inside = _cache_rows(req_to_token, req_pool_indices, seq_lens)
    batch, length = inside.shape
    column, position = torch.arange(width), torch.arange(length)
    first = (seq_lens - extend_seq_lens)[:, None]  # [B, 1] position of the first new token
    if tree_mask is None:
        visible = position <= (first + column)[:, :, None]  # [B, width, L]
    else:
        visible = (position < first[:, :, None]).expand(-1, width, -1).clone()
        among = tree_mask[: batch * width * width].view(batch, width, width)
        visible.scatter_(2, (first + column)[:, None].expand_as(among), among)
    exists = column < extend_seq_lens[:, None]  # [B, width]
    if bool(exists.all()):
        return Plan(batch, width, rows, _as_rows(visible, group))
    token_of_query = torch.zeros_like(exists, dtype=torch.int64)
    token_of_query[exists] = torch.arange(int(extend_seq_lens.sum()))
    visible |= ~exists[:, :, None]  # a padded query must attend to something, or its softmax is NaN
    query_of_token = exists.flatten().nonzero().flatten()
    return Plan(batch, width, rows, _as_rows(visible, group), token_of_query.flatten(), query_of_token)


def attend(plan: Plan, q, k_buffer, v_buffer, scale: float) -> torch.Tensor:
    """Return the attention [T, A, D] of q [T, A, D] over cached rows [rows, K, D]."""
    keys, values = _gather(k_buffer, plan), _gather(v_buffer, plan)
    queries = q if plan.token_of_query is None else q.index_select(0, plan.token_of_query)
    queries = queries.view(plan.batch, plan.width, *q.shape[1:])
    attend_padded = _attend_merged if plan.width <= FEW_QUERIES else _attend_plain
    attended = attend_padded(queries.float(), keys, values, plan.mask, scale).to(q.dtype).reshape(-1, *q.shape[1:])
    return attended if plan.query_of_token is None else attended.index_select(0, plan.query_of_token)


def decode_attention_cpu(
    q, k_buffer, v_buffer, k_scale, v_scale, o, k, v, loc, attn_logits, req_to_token, req_pool_indices, seq_lens,
    sm_scale, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks,
) -> None:  # fmt: skip
    """Store the key and value of each request's new token, then attend over its first `seq_lens` positions, into `o`.

    q, o: [B, A, D]. k, v: [B, K, D] or None, stored at cache rows `loc` [B]. req_to_token: [slots, positions].
    """
    _refuse(logit_cap, is_cross_attention, sliding_window, sinks, k_scale, v_scale)
    if k is not None:
        k_buffer.index_copy_(0, loc, k.view(-1, *k_buffer.shape[1:]))
        v_buffer.index_copy_(0, loc, v.view(-1, *v_buffer.shape[1:]))
    o.copy_(attend(plan_decode(req_to_token, req_pool_indices, seq_lens), q, k_buffer, v_buffer, sm_scale))


def extend_attention_cpu(
    q, k, v, o, k_buffer, v_buffer, k_scale, v_scale, req_to_token, req_pool_indices, seq_lens, extend_seq_lens,
    extend_start_loc, max_extend_len, sm_scale, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks,
    tree_mask, is_causal,
) -> None:  # fmt: skip
    """Attend from the last `extend_seq_lens` positions of each request over its first `seq_lens`, into `o` [T, A, D].

    The new keys and values, `k` and `v`, are in the cache already.
    """
    _refuse(logit_cap, is_cross_attention, sliding_window, sinks, k_scale, v_scale)
    if not is_causal:
        raise NotImplementedError("the CPU stand-in of sgl_kernel supports causal models only")
    if q.shape[0]:
        group = q.shape[1] // k_buffer.shape[1]
        plan = plan_extend(req_to_token, req_pool_indices, seq_lens, extend_seq_lens, group, tree_mask)
        o.copy_(attend(plan, q, k_buffer, v_buffer, sm_scale))


def _attend_merged(queries, keys, values, mask, scale) -> torch.Tensor:
    """Attend from queries [B, n, A, D], with the heads of a group as rows of one query -> [B, n, A, D]."""
    batch, width, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    rows = queries.view(batch, width, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return attended.view(batch, kv_heads, group, width, dim).permute(0, 3, 1, 2, 4).reshape(batch, width, heads, dim)


def _attend_plain(queries, keys, values, mask, scale) -> torch.Tensor:
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=queries.shape[2] != keys.shape[1]
    )
    return attended.transpose(1, 2)


def _gather(buffer: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Gather the plan's rows: [rows, K, D] -> [B, K, L, D] in float32."""
    return buffer.index_select(0, plan.rows).float().view(plan.batch, -1, *buffer.shape[1:]).transpose(1, 2)


def _cache_rows(req_to_token, req_pool_indices, seq_lens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cache rows [B * L] of the first `seq_lens` positions, and a mask [B, L], False at padding."""
    length = int(seq_lens.max())
    inside = torch.arange(length) < seq_lens[:, None]
    rows = req_to_token[:, :length].index_select(0, req_pool_indices.long()).long().masked_fill_(~inside, 0)
    return rows.flatten(), inside


def _as_rows(visible, group: int) -> torch.Tensor:
    """Make the mask for `_attend_merged` if queries are few, else for `_attend_plain`, from visible [B, width, L]."""
    scores = _as_scores(visible[:, None])
    return scores.repeat(1, 1, group, 1) if visible.shape[1] <= FEW_QUERIES else scores


def _as_scores(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def _refuse(logit_cap, is_cross_attention, sliding_window, sinks, k_scale, v_scale) -> None:
    if logit_cap > 0 or is_cross_attention or sliding_window > 0 or sinks is not None or k_scale != 1 or v_scale != 1:
        raise NotImplementedError(
            "the CPU stand-in of sgl_kernel supports plain causal attention only: no capped logits, cross attention, "
            "sliding windows, attention sinks or scaled caches"
        )
