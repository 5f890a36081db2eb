"""Checks that this trainer can train the model of a Hugging Face config, from the config alone.

A feature that Megatron would silently ignore, such as a sliding window, is an error: it would be trained wrongly.
"""

from __future__ import annotations

from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import family_of
from respec_trainer.models.rules import head_dim


def check_model(hf_config, tp: int, model_key: str = "model.path", tp_key: str = "actor.parallel.tp") -> None:
    """Raise ConfigError unless the model of `hf_config` can be trained over `tp` tensor-parallel ranks.

    `model_key` and `tp_key` are the configuration keys of the model and of `tp`, for errors.
    """
    for problem in family_of(hf_config, model_key).problems(hf_config):
        raise ConfigError(f"{model_key}: config.json of this {hf_config.model_type} model has {problem}")
    problem = _why_not_split(hf_config, tp)
    if problem:
        works = [n for n in range(1, hf_config.num_attention_heads + 1) if _why_not_split(hf_config, n) is None]
        raise ConfigError(f"{tp_key}={tp} {problem}; set {tp_key} to one of {', '.join(map(str, works))}")


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
