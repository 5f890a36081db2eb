"""Indices of the paged KV cache: the cache rows of each request's positions."""

from __future__ import annotations

import ctypes

import torch


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len) -> None:
    """Write `out_cache_loc` [T], request after request, to positions start..end of each request's row of the pool."""
    slots, positions = _ragged(req_pool_indices, start, end)
    req_to_token[slots, positions] = out_cache_loc[: slots.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len) -> None:
    """Read positions start..end of each request's row into the front of `out_cache_loc`, request after request."""
    slots, positions = _ragged(req_pool_indices, start, end)
    out_cache_loc[: slots.numel()] = req_to_token[slots, positions].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
) -> None:
    """Read the topk * num_steps positions after each request's `seq_lens` into `out_cache_loc`."""
    positions = seq_lens[:, None] + torch.arange(topk * num_steps)
    out_cache_loc.copy_(req_to_token[req_pool_indices[:, None].long(), positions].flatten())


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """Return cache locations [B * topk, L] of each branch: the request's own, then the branch's `num_steps`."""
    column = torch.arange(int(seq_lens.max()) + num_steps)
    branch = torch.arange(topk)[None, :, None] * num_steps
    lens = seq_lens[:, None, None]
    # Positions past the end of a short request's branch are unused; clamp_ only keeps them inside the row.
    positions = torch.where(column < lens, column, column + branch).clamp_(max=req_to_token.shape[1] - 1)
    return req_to_token[req_pool_indices[:, None, None].long(), positions].flatten(0, 1)


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc) -> None:
    """Copy cache rows `src_loc` to `tgt_loc` in every buffer. Rows may be in both: all are read before any is written.

    data_ptrs: [buffers] addresses. strides: [buffers] bytes of a row.
    """
    if tgt_loc.numel() == 0:
        return
    tgt_loc, src_loc = tgt_loc.long(), src_loc.long()
    rows = int(torch.maximum(tgt_loc.max(), src_loc.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer.index_copy_(0, tgt_loc, buffer.index_select(0, src_loc))


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride) -> None:
    """Write each request's last accepted token. accept_tokens: [B * accept_stride]; accept_lens includes the bonus."""
    batch = accept_lens.numel()
    last = torch.arange(batch) * accept_stride + accept_lens - 1
    bonus_tokens[:batch] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc) -> None:
    """Write the cache rows of accepted nodes, packed to the front. accept_index: node indices, -1 for none."""
    accepted = accept_index[accept_index > -1].long()
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted]


def _ragged(slots, start, end) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (slot, position), both [T], of every position in start..end of each request, request after request."""
    lens = (end - start).long()
    offset = start - (lens.cumsum(0) - lens)
    owner = torch.repeat_interleave(lens)
    return slots.long()[owner], torch.arange(owner.numel()) + offset[owner]
