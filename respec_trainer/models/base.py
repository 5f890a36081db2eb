"""Family: all that is specific to one family of Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from respec_trainer.models.layout import Rule
from respec_trainer.models.limits import Limit
from respec_trainer.models.names import Names

# Arguments of Megatron's TransformerConfig that depend on the family, with their usual values.
MEGATRON = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}


def same_width(hf_config) -> int:
    """The target's intermediate size."""
    return hf_config.intermediate_size


@dataclass(frozen=True)
class Family:
    """A family of decoders. `hf_config` is always the Hugging Face config of one of its models.

    Args:
        model_type: the model_type of config.json.
        architectures: the architectures of config.json that the actor trains and SGLang serves.
        names: the module paths of the Hugging Face model.
        limits: checks for features that are not supported; see limits.py.
        megatron: arguments of Megatron's TransformerConfig.
        in_layer: parameter of a Megatron layer -> the rule that makes it, in the order of the Hugging Face tensors.
        outside: the same for the parameters outside the layers, under Megatron's full names.
        fused: SGLang's fused module -> the Hugging Face modules that it holds, in SGLang's order.
        engine_models: SGLang's classes whose forward pass rollout/sglang/inside/cpu/forward.py computes.
        feature_layers: number of the target's layers -> the three whose outputs its EAGLE-3 drafter reads by default.
        drafter_width: hf_config -> the intermediate size of its drafter by default.
    """

    model_type: str
    architectures: tuple[str, ...]
    names: Names
    limits: tuple[Limit, ...]
    megatron: Mapping[str, Any]
    in_layer: Mapping[str, Rule]
    outside: Mapping[str, Rule]
    fused: Mapping[str, tuple[str, ...]]
    engine_models: tuple[str, ...]
    feature_layers: Callable[[int], tuple[int, int, int]]
    drafter_width: Callable[[Any], int] = same_width

    def problems(self, hf_config) -> Iterator[str]:
        """Yield a text for each feature of `hf_config` that the actor does not support, with its key and the remedy."""
        named = hf_config.architectures or self.architectures
        if not set(named) & set(self.architectures):
            known = " or ".join(self.architectures)
            yield f"architectures {', '.join(named)}, but only {known} is supported; give a folder of such a model"
        for limit in self.limits:
            problem = limit(hf_config)
            if problem:
                yield problem
