"""Qwen3: norms of queries and keys, one for each head's vector."""

from __future__ import annotations

from respec_trainer.models.base import MEGATRON, Family
from respec_trainer.models.feature_layers import feature_layers
from respec_trainer.models.limits import DECODER_LIMITS
from respec_trainer.models.names import Names, fused_modules
from respec_trainer.models.rules import decoder_layer, outside_layers

NAMES = Names()
QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    names=NAMES,
    limits=DECODER_LIMITS,
    megatron=MEGATRON | {"qk_layernorm": True},
    in_layer=decoder_layer(NAMES, qk_norm=True),
    outside=outside_layers(NAMES),
    fused=fused_modules(NAMES),
    engine_models=("sglang.srt.models.qwen3.Qwen3Model",),
    feature_layers=feature_layers,
)
