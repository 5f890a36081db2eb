"""The transformers classes of the made-up family Olive; transformers itself has those of real families.

Import it after define_torchvision_operators.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


class OliveConfig(Qwen3Config):
    model_type = "olive"


class OliveForCausalLM(Qwen3ForCausalLM):
    config_class = OliveConfig
    _tied_weights_keys = {"classifier.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.classifier = self._modules.pop("lm_head")
        for layer in self.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, torch.nn.Linear(plain.in_features, plain.out_features))

    @property
    def lm_head(self) -> torch.nn.Linear:
        return self.classifier

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.classifier


def register() -> None:
    """Register the classes with AutoConfig and AutoModelForCausalLM."""
    AutoConfig.register("olive", OliveConfig, exist_ok=True)
    AutoModelForCausalLM.register(OliveConfig, OliveForCausalLM, exist_ok=True)
