"""Names: the module paths of a family's Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Paths of modules: first those relative to the model, then those relative to a layer."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"

    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def embedding_weight(self) -> str:
        return f"{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"


def fused_modules(names: Names) -> dict[str, tuple[str, ...]]:
    """SGLang's fused module -> the layer's Hugging Face modules that it holds, in SGLang's order."""
    attention, mlp = (names.query, names.key, names.value), (names.gate, names.up)
    return {"qkv_proj": tuple(map(leaf, attention)), "gate_up_proj": tuple(map(leaf, mlp))}


def leaf(path: str) -> str:
    """The last part of a module's path."""
    return path.rpartition(".")[2]
