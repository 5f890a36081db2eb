"""DrafterShape: the sizes of a drafter, and what it must share with its target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import family_of
from respec_trainer.models.rules import head_dim

VOCABULARY_MULTIPLE = 64  # the draft vocabulary's size must be a multiple: SGLang pads the head's rows to one


@dataclass(frozen=True)
class DrafterShape:
    """Sizes, named as in the target's config. Heads, rope and positions are the target's: both share one cache."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rope: dict[str, Any]  # rope_type, rope_theta and the type's own numbers, as transformers' rope_parameters
    feature_layers: tuple[int, int, int]  # 0-based layers of the target whose outputs are the features
    target_layers: int
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    def __post_init__(self) -> None:
        if self.draft_vocab_size % VOCABULARY_MULTIPLE or not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size={self.draft_vocab_size} must be a multiple of {VOCABULARY_MULTIPLE} and at most "
                f"the target's vocab_size {self.vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @classmethod
    def for_target(cls, hf_config, draft_vocab_size: int, intermediate_size: int | None = None) -> DrafterShape:
        """The shape of a drafter for the target of `hf_config`. For `intermediate_size` None its family chooses one."""
        family = family_of(hf_config)
        return cls(
            hidden_size=hf_config.hidden_size,
            intermediate_size=intermediate_size or family.drafter_width(hf_config),
            num_attention_heads=hf_config.num_attention_heads,
            num_key_value_heads=hf_config.num_key_value_heads,
            head_dim=head_dim(hf_config),
            rms_norm_eps=hf_config.rms_norm_eps,
            vocab_size=hf_config.vocab_size,
            draft_vocab_size=draft_vocab_size,
            max_position_embeddings=hf_config.max_position_embeddings,
            rope=dict(hf_config.rope_parameters),
            feature_layers=family.feature_layers(hf_config.num_hidden_layers),
            target_layers=hf_config.num_hidden_layers,
            bos_token_id=hf_config.bos_token_id,
            eos_token_id=hf_config.eos_token_id,
        )


def inverse_frequencies(rope: dict[str, Any], size: int) -> torch.Tensor:
    """RoPE's inverse frequencies [size / 2] in float32 for the types "default", "linear" and "llama3".

    Llama 3 divides a frequency by `factor` if its wave repeats less than `low_freq_factor` times in the original
    context, keeps it above `high_freq_factor` times, and interpolates linearly in between. Raises ConfigError for
    another type.
    """
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind != "llama3":
        raise ConfigError(f"rope_type {kind!r} is not supported for a drafter; use default, linear or llama3")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    repeats = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((repeats - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])
