"""models/limits.py: features that would be trained wrongly, told with the remedy; configs that lack a key are fine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from respec_trainer.models.limits import DECODER_LIMITS

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
PLAIN = {"hidden_act": "silu", "rope_parameters": DEFAULT}


def problems(**changes) -> list[str]:
    config = SimpleNamespace(**(PLAIN | changes))
    return [problem for limit in DECODER_LIMITS if (problem := limit(config))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "layer_types": None},
        {"layer_types": ["full_attention"] * 2},
        {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}},
        {"rope_parameters": DEFAULT | {"rope_type": "linear"}},
        {"rope_parameters": DEFAULT | {"rope_type": "llama3"}},
    ],
)
def test_what_is_supported_has_no_problem(changes):
    assert problems(**changes) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', but only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias=true, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true, which is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "set use_sliding_window=false"),
        ({"attention_dropout": 0.01}, "attention_dropout > 0, but rollouts are drawn without dropout; set it to 0"),
        (
            {"rope_parameters": DEFAULT | {"rope_type": "yarn"}},
            "rope_type 'yarn', but only default, linear, llama3 are",
        ),
        ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor < 1"),
    ],
)
def test_what_is_not_is_told(changes, words):
    (problem,) = problems(**changes)
    assert words in problem
