"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from respec_trainer.models.base import MEGATRON, Family
from respec_trainer.models.feature_layers import feature_layers
from respec_trainer.models.limits import DECODER_LIMITS
from respec_trainer.models.names import Names, fused_modules
from respec_trainer.models.rules import decoder_layer, outside_layers

NAMES = Names()
QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    names=NAMES,
    limits=DECODER_LIMITS,
    megatron=MEGATRON | {"add_qkv_bias": True},
    in_layer=decoder_layer(NAMES, qkv_bias=True),
    outside=outside_layers(NAMES),
    fused=fused_modules(NAMES),
    engine_models=("sglang.srt.models.qwen2.Qwen2Model",),
    feature_layers=feature_layers,
)
