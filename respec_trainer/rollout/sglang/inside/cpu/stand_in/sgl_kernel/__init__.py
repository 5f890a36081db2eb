"""Stand-in for sglang's kernel package on a CPU: what sglang 0.5.21 asks for to speculate, vectorized, in torch.

Only names that sglang imports or looks up while `SGLANG_USE_CPU_ENGINE=1` are here. `convert_weight_packed` is left
out on purpose: its absence tells sglang that no AMX kernels exist, so that every layer takes its native path.

Shapes: B requests, T tokens of all requests, n draft tokens a request (the root included), V vocabulary.
"""

from __future__ import annotations

import torch

from .attention import decode_attention_cpu, extend_attention_cpu
from .cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
)
from .hashing import murmur_hash32_cpu
from .sampling import top_k_renorm_prob, top_p_renorm_prob, tree_speculative_sampling_target_only
from .tree import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "top_k_renorm_prob",
    "top_p_renorm_prob",
    "tree_speculative_sampling_target_only",
    "verify_tree_greedy_cpu",
]


def rotate_input_ids_cpu(*_args, **_kwargs):
    raise NotImplementedError("the CPU stand-in of sgl_kernel does not serve multi-layer EAGLE drafters")


# sglang looks these up in torch.ops. Attributes of the namespace do, and spare each call the dispatcher.
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu

# This one is asked for by its overload, so it has to be an operator.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")
