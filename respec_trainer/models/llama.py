"""Llama 2 and 3: no biases, and no norms of queries and keys."""

from __future__ import annotations

from respec_trainer.models.base import MEGATRON, Family
from respec_trainer.models.feature_layers import feature_layers
from respec_trainer.models.limits import DECODER_LIMITS
from respec_trainer.models.names import Names, fused_modules
from respec_trainer.models.rules import decoder_layer, outside_layers

# SGLang's class of EAGLE-3 drafters for any family. Their weights have a Llama's names.
EAGLE3_DRAFTER = "LlamaForCausalLMEagle3"

NAMES = Names()
LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    names=NAMES,
    limits=DECODER_LIMITS,
    megatron=MEGATRON,
    in_layer=decoder_layer(NAMES),
    outside=outside_layers(NAMES),
    fused=fused_modules(NAMES),
    engine_models=("sglang.srt.models.llama.LlamaModel",),
    feature_layers=feature_layers,
)
