"""Family: all that one family of Hugging Face models has of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from respec_trainer.models.layout import Rule
from respec_trainer.models.limits import Limit
from respec_trainer.models.names import Names

# TransformerConfig's arguments that depend on the family.
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
        model_type: as in config.json.
        architectures: of config.json, those that the actor trains and SGLang serves.
        names: where the Hugging Face model keeps its parts.
        limits: what a config may not ask for; see limits.py.
        megatron: arguments of Megatron's TransformerConfig.
        in_layer: for each parameter of a Megatron layer the rule that makes it, in the order of the Hugging Face
            tensors.
        outside: the same for the parameters outside the layers, under Megatron's whole names.
        fused: for each of SGLang's fused modules the Hugging Face modules that it holds, in its order.
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
        """What `hf_config` asks for and the actor does not have, one text each, with the key and the remedy."""
        named = hf_config.architectures or self.architectures
        if not set(named) & set(self.architectures):
            known = " or ".join(self.architectures)
            yield f"architectures {', '.join(named)}, but only {known} is supported; give a folder of such a model"
        for limit in self.limits:
            problem = limit(hf_config)
            if problem:
                yield problem
