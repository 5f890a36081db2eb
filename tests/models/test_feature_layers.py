"""models/feature_layers.py: the three layers that a drafter reads."""

from __future__ import annotations

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.models.feature_layers import feature_layers


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (4, (0, 1, 2)),
        (5, (0, 1, 3)),
        (6, (0, 2, 4)),
        (7, (1, 2, 3)),
        (24, (1, 11, 20)),
        (28, (1, 13, 24)),
        (36, (1, 17, 32)),
    ],
)
def test_feature_layers(layers, chosen):
    assert feature_layers(layers) == chosen


def test_feature_layers_are_always_three_below_the_last():
    for layers in range(4, 100):
        low, middle, high = feature_layers(layers)
        assert 0 <= low < middle < high < layers - 1


def test_too_few_layers():
    with pytest.raises(ConfigError, match="only 3 layers"):
        feature_layers(3)
