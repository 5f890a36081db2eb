from __future__ import annotations

import pytest
import torch.distributed as dist

from respec_trainer.actor.check import check_model
from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import FAMILIES
from tests.support.models import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_supported_models_pass_without_any_process_group(family, tp):
    check_model(tiny_config(family), tp)
    assert not dist.is_initialized()


def test_rope_variants_that_only_change_frequencies_pass():
    check_model(tiny_config("llama", rope_parameters=LLAMA3), 1)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic', but only default, linear, llama3",
        ),
    ],
)
def test_what_would_be_trained_wrongly_is_refused(family, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(tiny_config(family, **changes), 1)


def test_a_sliding_window_that_no_layer_uses_passes():
    check_model(tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2), 1)


def test_an_unknown_family_is_refused_with_those_supported():
    config = tiny_config("llama")
    config.model_type = "qwen2_moe"
    with pytest.raises(ConfigError, match="'qwen2_moe' is not supported; use one of qwen2, qwen3, llama .*'qwen2'?"):
        check_model(config, 1)


def test_a_model_that_is_no_language_model_is_refused():
    config = tiny_config("qwen2", architectures=["Qwen2ForSequenceClassification"])
    with pytest.raises(ConfigError, match="architectures Qwen2ForSequenceClassification, but only Qwen2ForCausalLM is"):
        check_model(config, 1)


def test_errors_name_the_keys_that_were_asked_about():
    config = tiny_config("qwen2", hidden_act="gelu")
    with pytest.raises(ConfigError, match="^drafter.path: config.json of this qwen2 model has hidden_act"):
        check_model(config, 1, model_key="drafter.path")
    with pytest.raises(ConfigError, match=r"^rollout\.engine\.tp=3 .*; set rollout\.engine\.tp to one of 1, 2, 4$"):
        check_model(tiny_config("qwen2"), 3, tp_key="rollout.engine.tp")
    config.model_type = "gpt2"
    with pytest.raises(ConfigError, match="^drafter.path: model_type 'gpt2'"):
        check_model(config, 1, model_key="drafter.path")


def test_tp_must_divide_the_heads():
    with pytest.raises(ConfigError, match=r"tp=3 does not divide the model's 4 attention heads .* one of 1, 2, 4"):
        check_model(tiny_config("qwen2"), 3)


def test_tp_must_divide_the_intermediate_size():
    config = tiny_config("qwen2", intermediate_size=98)
    with pytest.raises(ConfigError, match=r"tp=4 does not divide the model's intermediate_size 98; .* one of 1, 2"):
        check_model(config, 4)


def test_tp_and_key_value_heads_must_be_multiples_of_each_other():
    config = tiny_config("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6, intermediate_size=96)
    with pytest.raises(ConfigError, match="neither a divisor nor a multiple of the model's 6 key/value heads"):
        check_model(config, 4)


def test_tp_must_divide_the_fused_rows_of_queries_keys_and_values():
    """(8 query heads + 2 of keys + 2 of values) * head size 3 are 36 rows, which 8 ranks cannot share."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 3, "intermediate_size": 96}
    config = tiny_config("qwen3", **sizes)
    check_model(config, 4)
    with pytest.raises(ConfigError, match="tp=8 does not divide the rows of the query, key and value .* 1, 2, 4$"):
        check_model(config, 8)
