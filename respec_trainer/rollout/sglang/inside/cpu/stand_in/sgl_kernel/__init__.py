"""Stand-in for sglang's kernel package on a CPU: the kernels that sglang 0.5.21 needs to speculate, in torch.

It has only the names that sglang imports or looks up with `SGLANG_USE_CPU_ENGINE=1`. `convert_weight_packed` is left
out on purpose: sglang checks for it to see whether AMX kernels exist, and without it every layer uses its native path.

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
    raise NotImplementedError("the CPU stand-in of sgl_kernel does not support multi-layer EAGLE drafters")


# sglang looks these up in torch.ops. Plain attributes of the namespace suffice, and calls then skip the dispatcher.
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu

# sglang looks this one up by its overload, so it has to be an operator.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")
