"""drafter/shape.py: the sizes that a drafter takes from its target, and RoPE frequencies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from respec_trainer.drafter.shape import DrafterShape, inverse_frequencies
from respec_trainer.errors import ConfigError
from tests.support.drafters import target_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR])
def test_scaled_frequencies_equal_those_of_transformers(rope):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = target_config("llama", rope_parameters=rope, head_dim=32)
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert scale == 1.0
    torch.testing.assert_close(inverse_frequencies(rope, 32), expected)


def test_plain_frequencies():
    rope = {"rope_type": "default", "rope_theta": 100.0}
    torch.testing.assert_close(inverse_frequencies(rope, 4), torch.tensor([1.0, 0.1]))


def test_unknown_rope_is_refused():
    with pytest.raises(ConfigError, match="yarn"):
        inverse_frequencies({"rope_type": "yarn", "rope_theta": 1.0}, 4)


def test_shape_takes_heads_and_positions_from_the_target():
    config = target_config("qwen3")
    shape = DrafterShape.for_target(config, 64)
    assert (shape.head_dim, shape.num_attention_heads, shape.hidden_size) == (32, 4, 64)  # heads wider than hidden
    assert shape.intermediate_size == config.intermediate_size
    assert DrafterShape.for_target(config, 64, intermediate_size=80).intermediate_size == 80
    assert DrafterShape.for_target(target_config("qwen2"), 64).head_dim == 16  # not named in Qwen2's config


@pytest.mark.parametrize("size", [0, 63, 100, 192])
def test_sizes_of_vocabulary_that_cannot_be_served(size):
    with pytest.raises(ConfigError, match="draft_vocab_size"):
        DrafterShape.for_target(target_config(), size)


def test_every_size_is_the_target_s():
    config = target_config("llama", rms_norm_eps=3e-4, num_key_value_heads=2, bos_token_id=7, eos_token_id=[8, 9])
    shape = DrafterShape.for_target(config, 128)
    assert (shape.rms_norm_eps, shape.num_attention_heads, shape.num_key_value_heads) == (3e-4, 4, 2)
    assert (shape.vocab_size, shape.draft_vocab_size, shape.target_layers) == (131, 128, 4)
    assert shape.max_position_embeddings == config.max_position_embeddings
    assert (shape.bos_token_id, shape.eos_token_id, shape.rope) == (7, [8, 9], dict(config.rope_parameters))


def test_key_heads_have_to_divide_the_query_heads():
    shape = DrafterShape.for_target(target_config(), 64)
    assert dataclasses.replace(shape, num_key_value_heads=1).num_key_value_heads == 1
    with pytest.raises(ConfigError, match="num_key_value_heads=3 does not divide num_attention_heads=4"):
        dataclasses.replace(shape, num_key_value_heads=3)
