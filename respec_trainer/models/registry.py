"""FAMILIES: the model families that this trainer supports, by the model_type of their config.json."""

from __future__ import annotations

from respec_trainer.errors import ConfigError
from respec_trainer.models.base import Family
from respec_trainer.models.llama import LLAMA
from respec_trainer.models.qwen2 import QWEN2
from respec_trainer.models.qwen3 import QWEN3
from respec_trainer.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "model.path's model_type", {family.model_type: family for family in (QWEN2, QWEN3, LLAMA)}
)


def head_weights() -> tuple[str, ...]:
    """All names that the families give the output layer's weight, without duplicates."""
    return tuple(dict.fromkeys(FAMILIES[name].names.head_weight for name in FAMILIES))


def family_named(model_type: str | None, key: str = "model.path") -> Family:
    """The family of that model_type. `key` is the configuration key of the model, for errors.

    Raises ConfigError for an unknown type, with the nearest name and all names.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{key}: model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)} "
            f"(did you mean {FAMILIES.nearest(str(model_type))!r}? Qwen2.5 is of type qwen2)"
        )
    return FAMILIES[model_type]


def family_of(hf_config, key: str = "model.path") -> Family:
    """The family of the model with Hugging Face config `hf_config`. Raises ConfigError as `family_named` does."""
    return family_named(hf_config.model_type, key)
