"""Checks for features of a family's config that Megatron or the engine would silently ignore.

A limit is a function hf_config -> a text with the key, its value and the remedy, or None if the config is fine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Limit = Callable[[Any], str | None]
# RoPE variants that only change the frequencies; the others also scale attention or depend on the length.
ROPE_TYPES = ("default", "linear", "llama3")


def silu(hf_config) -> str | None:
    if hf_config.hidden_act != "silu":
        return f"hidden_act {hf_config.hidden_act!r}, but only 'silu' is supported"
    return None


def no_bias_keys(hf_config) -> str | None:
    """Refuse attention_bias, which adds a bias to the output projection too, and mlp_bias."""
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, bias, False):
            return f"{bias}=true, which is not supported; Qwen2's query, key and value biases are"
    return None


def no_sliding_window(hf_config) -> str | None:
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or []):
        return "layers with a sliding window, which is not supported; set use_sliding_window=false"
    return None


def no_dropout(hf_config) -> str | None:
    if getattr(hf_config, "attention_dropout", 0.0):
        return "attention_dropout > 0, but rollouts are drawn without dropout; set it to 0"
    return None


def frequency_rope(hf_config) -> str | None:
    """Accept RoPE over the whole head, of a variant that changes only the frequencies."""
    rope = hf_config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        return f"rope_type {rope['rope_type']!r}, but only {known} are supported; remove rope_scaling from it"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor < 1, which is not supported"
    return None


DECODER_LIMITS: tuple[Limit, ...] = (silu, no_bias_keys, no_sliding_window, no_dropout, frequency_rope)
