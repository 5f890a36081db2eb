"""Rules that build the layouts of a Megatron GPT model's parameters from the names of Hugging Face modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from respec_trainer.models.layout import Layout, Rule, Segment
from respec_trainer.models.names import Names

Size = Callable[[Any], int]  # hf_config -> a size


def head_dim(hf_config) -> int:
    """Size of one attention head. Qwen2's config has no head_dim, so it is computed."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def padded_vocab_size(hf_config, tp: int) -> int:
    """The number of vocabulary rows that Megatron holds: vocab_size rounded up to a multiple of `tp`."""
    return -(-hf_config.vocab_size // tp) * tp


def outside_layers(names: Names) -> dict[str, Rule]:
    """Rules for the parameters outside the layers."""
    return {
        "embedding.word_embeddings.weight": vocabulary(names.embedding_weight),
        "output_layer.weight": vocabulary(names.head_weight),
        "decoder.final_layernorm.weight": replicated(f"{names.final_norm}.weight"),
    }


def decoder_layer(names: Names, qkv_bias: bool = False, qk_norm: bool = False) -> dict[str, Rule]:
    """Rules for a layer's parameters, with optional biases on queries, keys and values or norms on queries and keys."""
    bias = {"self_attention.linear_qkv.bias": qkv(names, "bias")}
    norms = {
        "self_attention.q_layernorm.weight": replicated(f"{names.query_norm}.weight", head_dim),
        "self_attention.k_layernorm.weight": replicated(f"{names.key_norm}.weight", head_dim),
    }
    return {
        "input_layernorm.weight": replicated(f"{names.attention_norm}.weight"),
        "self_attention.linear_qkv.weight": qkv(names, "weight"),
        **(bias if qkv_bias else {}),
        **(norms if qk_norm else {}),
        "self_attention.linear_proj.weight": columns(
            f"{names.attention_output}.weight", lambda config: config.num_attention_heads * head_dim(config)
        ),
        "pre_mlp_layernorm.weight": replicated(f"{names.mlp_norm}.weight"),
        "mlp.linear_fc1.weight": gate_and_up(names),
        "mlp.linear_fc2.weight": columns(f"{names.down}.weight", lambda config: config.intermediate_size),
    }


def replicated(source: str, size: Size = lambda config: config.hidden_size) -> Rule:
    """The rule of a vector that every rank holds whole."""
    return lambda config, tp, prefix: Layout(None, (Segment(prefix + source, 0, size(config)),))


def vocabulary(source: str) -> Rule:
    """The rule of a weight [V, H], padded at its end to a multiple of tp rows."""

    def layout(config, tp: int, prefix: str) -> Layout:
        padding = padded_vocab_size(config, tp) - config.vocab_size
        rows = Segment(prefix + source, 0, config.vocab_size)
        return Layout(0, (rows, Segment(None, 0, padding)) if padding else (rows,))

    return layout


def columns(source: str, size: Size) -> Rule:
    """The rule of a row-parallel weight [out, in]: each rank holds some columns, with all their rows."""
    return lambda config, tp, prefix: Layout(1, (Segment(prefix + source, 0, size(config)),))


def qkv(names: Names, kind: str) -> Rule:
    """The rule of the weights or biases (`kind`) of queries, keys and values, ordered by group of heads."""

    def layout(config, tp: int, prefix: str) -> Layout:
        head, groups = head_dim(config), config.num_key_value_heads
        queries = config.num_attention_heads // groups * head
        segments: list[Segment] = []
        for group in range(groups):
            for projection, rows in ((names.query, queries), (names.key, head), (names.value, head)):
                segments.append(Segment(f"{prefix}{projection}.{kind}", group * rows, rows))
        return Layout(0, tuple(segments))

    return layout


def gate_and_up(names: Names) -> Rule:
    """The rule of the two weights of the gated MLP: each rank holds the same rows of both."""

    def layout(config, tp: int, prefix: str) -> Layout:
        rows = config.intermediate_size // tp
        pairs = [(rank, projection) for rank in range(tp) for projection in (names.gate, names.up)]
        return Layout(0, tuple(Segment(f"{prefix}{p}.weight", rank * rows, rows) for rank, p in pairs))

    return layout
