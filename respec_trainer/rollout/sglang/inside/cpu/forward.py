"""Forward passes of the decoder families without a GPU, with little besides the matrix products.

sglang's layers support every model, device and parallelism, which costs ten times the arithmetic of a small model:
0.5 ms a layer on one core. A plain dense decoder (the families of models/ and the EAGLE-3 drafter) needs none of it.
These functions wrap sglang's own, use the same modules, parameters, caches and metadata, and call sglang's functions
for everything that is not plain. They round as transformers does: the residual stream and the rotary factors are in the
model's dtype. The module can be imported in the engine's processes only, because of `sgl_kernel`.

Shapes: T new tokens of all requests, H hidden size, A query heads, K key heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sgl_kernel.attention import Plan, attend, plan_decode, plan_extend


class Context:
    """Shared data of the layers of one forward pass: attention plan, cache, and rotary factors [T, 1, D].

    rotated = x * cos + (x with its halves swapped) * sin
    """

    def __init__(self, model, positions, plan: Plan, pool, cache_loc, wanted: torch.Tensor | None = None):
        """New tokens at `positions` [T] are stored at rows `cache_loc` [T] of sglang's cache `pool`.

        wanted: indices [B] of the tokens whose output is needed, to which `plan` applies; None for all.
        """
        self.plan, self.pool, self.cache_loc, self.wanted = plan, pool, cache_loc, wanted
        table = model.layers[0].self_attn.rotary_emb.cos_sin_cache.index_select(0, positions)
        cos, sin = table.to(model.embed_tokens.weight.dtype).unsqueeze(1).chunk(2, -1)
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def pick(self, x) -> torch.Tensor:
        """Return the rows of x [T, ...] whose output is needed."""
        return x if self.wanted is None else x.index_select(0, self.wanted)

    def attend(self, layer, q, k, v) -> torch.Tensor:
        """Store k and v [T, K, D]; return the wanted rows' attention of q [T, A, D] in sglang's RadixAttention."""
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        keys.index_copy_(0, self.cache_loc, k)
        values.index_copy_(0, self.cache_loc, v)
        return attend(self.plan, self.pick(q), keys, values, layer.scaling)


def current_context(model, positions, forward_batch) -> Context:
    """Return the Context of the pass that sglang is running, from the metadata of its attention backend."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    slots, req_to_token = forward_batch.req_pool_indices, backend.req_to_token_pool.req_to_token
    if backend.draft_decode_metadata is not None:  # a drafting step: every branch counts as a request
        req_to_token, seq_lens, slots = backend.draft_decode_metadata
        plan = plan_decode(req_to_token, slots, seq_lens)
    elif backend.extend_metadata is None:
        plan = plan_decode(req_to_token, slots, forward_batch.seq_lens)
    else:
        seq_lens, new, _, tree_mask = backend.extend_metadata
        attention = model.layers[0].self_attn
        plan = plan_extend(req_to_token, slots, seq_lens, new, attention.num_heads // attention.num_kv_heads, tree_mask)
    return Context(model, positions, plan, backend.token_to_kv_pool, forward_batch.out_cache_loc)


def target_forward(original, model, input_ids, positions, forward_batch, input_embeds=None, pp_proxy_tensors=None):
    """Replace the forward of the families' `engine_models`: return the final hidden states [T, H].

    If layers are captured for the drafter, also return the list of their inputs.
    """
    if not is_plain(model) or input_embeds is not None or input_ids.numel() == 0:
        return original(model, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
    residual = F.embedding(input_ids, model.embed_tokens.weight)
    context = current_context(model, positions, forward_batch)
    captured = []
    for index, layer in enumerate(model.layers):
        if index in model.layers_to_capture:
            captured.append(residual)
        residual = residual + _attention(layer.self_attn, _norm(layer.input_layernorm, residual), context)
        residual = residual + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, residual))
    hidden = _norm(model.norm, residual)
    return (hidden, captured) if captured else hidden


def drafter_forward(original, model, input_ids, positions, forward_batch, input_embeds=None, pp_proxy_tensors=None):
    """Replace the forward of sglang's EAGLE-3 LlamaModel: return (normed output, [features for its next step])."""
    if not is_plain(model) or input_embeds is not None or input_ids.numel() == 0:
        return original(model, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
    context = current_context(model, positions, forward_batch)
    hidden, features = drafter_step(model, input_ids, forward_batch.spec_info.hidden_states, context)
    return hidden, [features]


def drafter_step(model, input_ids, features, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one pass of the drafter: return (normed output, features for its next step), [T, H], or [B, H] if `wanted`.

    features: [T, H] from its own previous step, or [T, 3H] from the target's captured layers.
    """
    embedded = F.embedding(input_ids, model.embed_tokens.weight)
    if features.shape[-1] != embedded.shape[-1]:
        features = _linear(model.fc, features)
    (layer,) = model.layers
    x = torch.cat((_norm(layer.input_layernorm, embedded), _norm(layer.hidden_norm, features)), -1)
    residual = context.pick(features) + _attention(layer.self_attn, x, context)
    residual = residual + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, residual))
    hidden = _norm(model.norm, residual)
    return hidden, hidden if model.norm_output else residual


def is_plain(model) -> bool:
    """Return whether the functions above can compute this model; checked once for each model."""
    if "respec_is_plain" not in vars(model):
        model.respec_is_plain = _looks_plain(model)
    return model.respec_is_plain


def _attention(module, x, context: Context) -> torch.Tensor:
    """Attention layer, [T, H] -> [T, H]. Queries and keys are normed and rotated as one tensor of A + K heads."""
    tokens, dim, heads = x.shape[0], module.head_dim, module.num_heads
    joint, v = _linear(module.qkv_proj, x).split((module.q_size + module.kv_size, module.kv_size), -1)
    joint = joint.view(tokens, -1, dim)
    if hasattr(module, "q_norm"):
        joint = F.rms_norm(joint, (dim,), None, module.q_norm.variance_epsilon)
        joint[:, :heads].mul_(module.q_norm.weight)
        joint[:, heads:].mul_(module.k_norm.weight)
    first, second = joint.chunk(2, -1)
    joint = (joint * context.cos).add_(torch.cat((second, first), -1).mul_(context.sin))
    attended = context.attend(module.attn, joint[:, :heads], joint[:, heads:], v.view(tokens, -1, dim))
    return _linear(module.o_proj, attended.flatten(1))


def _feed_forward(module, x) -> torch.Tensor:
    gate, up = _linear(module.gate_up_proj, x).chunk(2, -1)
    return _linear(module.down_proj, F.silu(gate).mul_(up))


def _norm(module, x) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _linear(module, x) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


def _looks_plain(model) -> bool:
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size > 1 or get_parallel().pp_size > 1:
        return False
    if any(getattr(model, name, None) for name in ("is_mrope_enabled", "input_norm", "fc_norm")):
        return False
    rotary = model.layers[0].self_attn.rotary_emb
    if type(rotary).forward_native is not RotaryEmbedding.forward_native or not rotary.is_neox_style:
        return False
    for layer in model.layers:
        attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
        if not isinstance(getattr(mlp, "act_fn", None), SiluAndMul) or attention.rotary_emb is not rotary:
            return False
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        if any(type(linear.quant_method) is not UnquantizedLinearMethod for linear in linears):
            return False
        if rotary.rotary_dim != attention.head_dim or attention.attn.sliding_window_size > 0:
            return False
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return all(type(norm) is RMSNorm and norm.variance_size_override is None for norm in norms)
