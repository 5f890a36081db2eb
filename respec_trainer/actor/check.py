"""Whether this trainer can train the model of a Hugging Face config: judged from the config alone, before any weights.

A feature that Megatron would silently leave out, a sliding window say, is refused rather than trained wrongly.
"""

from __future__ import annotations

from respec_trainer.errors import ConfigError
from respec_trainer.weights.hf_map import head_dim

FAMILIES = ("qwen2", "qwen3", "llama")
# RoPE variants that only change the frequencies; the others also scale attention or depend on the length.
ROPE_TYPES = ("default", "linear", "llama3")


def check_model(hf_config, tp: int) -> None:
    """Raise ConfigError unless the model of `hf_config` can be trained over `tp` tensor-parallel ranks."""
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(
            f"model.path: model_type {hf_config.model_type!r} is not supported; use one of {', '.join(FAMILIES)} "
            f"(Qwen2.5 is of type qwen2)"
        )
    for problem in _unsupported(hf_config):
        raise ConfigError(f"model.path: config.json of this {hf_config.model_type} model has {problem}")
    problem = _why_not_split(hf_config, tp)
    if problem:
        works = [n for n in range(1, hf_config.num_attention_heads + 1) if _why_not_split(hf_config, n) is None]
        raise ConfigError(
            f"actor.parallel.tp={tp} {problem}; set actor.parallel.tp to one of {', '.join(map(str, works))}"
        )


def _unsupported(hf_config):
    """What the model needs and the actor has not, one text each."""
    if hf_config.hidden_act != "silu":
        yield f"hidden_act {hf_config.hidden_act!r}, but only 'silu' is supported"
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, bias, False):
            yield f"{bias}=true, which is not supported; Qwen2's query, key and value biases are"
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or []):
        yield "layers with a sliding window, which is not supported; set use_sliding_window=false"
    if getattr(hf_config, "attention_dropout", 0.0):
        yield "attention_dropout > 0, but rollouts are drawn without dropout; set it to 0"
    rope = hf_config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        yield f"rope_type {rope['rope_type']!r}, but only {known} are supported; remove rope_scaling from it"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor < 1, which is not supported"


def _why_not_split(hf_config, tp: int) -> str | None:
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % tp:
        return f"does not divide the model's {heads} attention heads (num_attention_heads)"
    if hf_config.intermediate_size % tp:
        return f"does not divide the model's intermediate_size {hf_config.intermediate_size}"
    # More ranks than key/value heads is fine: Megatron then gathers a group's rows over the ranks that share it.
    if groups % tp and tp % groups:
        return f"is neither a divisor nor a multiple of the model's {groups} key/value heads (num_key_value_heads)"
    if (heads + 2 * groups) * head_dim(hf_config) % tp:
        return "does not divide the rows of the query, key and value projections together"
    return None
