"""Olive, a made-up family: a Llama with query, key and value biases, query and key norms, and a head of another name.

The Family is the example in docs/extending.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.models.base import MEGATRON, Family
from respec_trainer.models.feature_layers import feature_layers
from respec_trainer.models.limits import DECODER_LIMITS
from respec_trainer.models.names import Names, fused_modules
from respec_trainer.models.registry import FAMILIES
from respec_trainer.models.rules import decoder_layer, outside_layers
from respec_trainer.registry import Registry


def shallow(hf_config) -> str | None:
    if hf_config.num_hidden_layers > 8:
        return f"num_hidden_layers={hf_config.num_hidden_layers}, but an Olive has at most 8; choose a smaller one"
    return None


NAMES = Names(head="classifier")
OLIVE = Family(
    model_type="olive",
    architectures=("OliveForCausalLM",),
    names=NAMES,
    limits=(*DECODER_LIMITS, shallow),
    megatron=MEGATRON | {"add_qkv_bias": True, "qk_layernorm": True},
    in_layer=decoder_layer(NAMES, qkv_bias=True, qk_norm=True),
    outside=outside_layers(NAMES),
    fused=fused_modules(NAMES),
    engine_models=("sglang.srt.models.olive.OliveModel",),
    feature_layers=feature_layers,
    drafter_width=lambda hf_config: 2 * hf_config.hidden_size,
)


@contextlib.contextmanager
def olive_known() -> Iterator[None]:
    """Add Olive to the registry within the block, and register its classes with transformers."""
    define_torchvision_operators()
    from tests.support.olive_transformers import register

    register()
    families = {name: FAMILIES[name] for name in FAMILIES} | {"olive": OLIVE}
    with mock.patch("respec_trainer.models.registry.FAMILIES", Registry(FAMILIES.key, families)):
        yield
