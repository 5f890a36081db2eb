"""Norms and attention that are right under tensor parallelism, without Transformer Engine or a GPU.

If a rank has only part of the activations, its gradients of replicated weights are partial sums. Megatron adds them up
in its own optimizer step, which DeepSpeed never runs. So `RMSNorm` adds them up in its backward pass. Activations are
[S, B, H] as everywhere in Megatron, and [S / tp, B, H] between layers under sequence parallelism.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class RMSNorm(torch.nn.Module):
    """RMSNorm (arXiv 1910.07467), in transformers' order: normalize in float32, scale in the model's dtype."""

    sees_part = False  # whether a rank has only part of the activations, even without sequence parallelism

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.sum_gradient = config.tensor_model_parallel_size > 1 and (self.sees_part or config.sequence_parallel)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Forward: the identity. Backward: an all-reduce of the weight's gradient.
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sum_gradient else self.weight
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(hidden.dtype)


class HeadRMSNorm(RMSNorm):
    """The norm of queries and keys: all heads share one weight, and a rank has only some of the heads."""

    sees_part = True


class CausalAttention(torch.nn.Module):
    """Causal attention of right-padded sequences with torch's fused kernel.

    The padding needs no mask: a position depends only on earlier ones, and results at padding are never used.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_, softmax_scale: float | None = None, **__):
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, *_, **__) -> torch.Tensor:
        """Map query [S, B, heads, head_dim], key and value [S, B, kv heads, head_dim] to [S, B, heads * head_dim]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


def decoder_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Return Megatron's decoder spec with the modules above."""
    head_norm = HeadRMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(MLP, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
    )
    layers = [ModuleSpec(TransformerLayer, submodules=layer)] * config.num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def tag_sharded_parameters(model: GPTModel) -> None:
    """Mark every sharded parameter as `tensor_model_parallel`, with the dimension along which it is cut.

    Megatron marks parameters only if it also initializes the weights. DeepSpeed's gradient norm treats an unmarked
    parameter as a replica and counts it only on tensor-parallel rank 0, and resync would send only rank 0's shard.
    """
    cuts = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = cuts.get(type(module))
        if dim is None:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.tensor_model_parallel = True
            parameter.partition_dim = dim
            parameter.partition_stride = 1
