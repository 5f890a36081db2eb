"""The layers of a target whose outputs an EAGLE-3 drafter reads, counted from 0."""

from __future__ import annotations

from respec_trainer.errors import ConfigError


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers that SGLang 0.5.21 captures if the drafter's config names none; the same for every family."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """SGLang's default layers, or three other layers if the target has too few for those to differ.

    The last layer is never among them: SGLang captures a layer's output at the start of the next one. Raises
    ConfigError for a target of fewer than four layers.
    """
    low, middle, high = default_feature_layers(num_layers)
    if 0 <= low < middle < high:
        return (low, middle, high)
    if num_layers < 4:
        raise ConfigError(f"EAGLE-3 reads three layers below the last one; the target has only {num_layers} layers")
    return (0, (num_layers - 2) // 2, num_layers - 2)
