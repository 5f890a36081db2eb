"""models/: what each family says of its models is what transformers' models have."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import FAMILIES, family_of, head_weights
from tests.support.models import tiny_config, tiny_model


@pytest.fixture(params=list(FAMILIES))
def model(request):
    """A tiny model's config and the names of its weights."""
    config = tiny_config(request.param)
    return config, set(tiny_model(config).state_dict())


def test_megatron_is_told_of_the_biases_and_norms_that_there_are(model):
    config, names = model
    layer = {name.removeprefix("model.layers.0.") for name in names}
    assert dict(family_of(config).megatron) == {
        "normalization": "RMSNorm",
        "gated_linear_unit": "mlp.gate_proj.weight" in layer,
        "add_bias_linear": "self_attn.o_proj.bias" in layer or "mlp.down_proj.bias" in layer,
        "add_qkv_bias": "self_attn.q_proj.bias" in layer,
        "qk_layernorm": "self_attn.q_norm.weight" in layer,
    }


def test_names_are_those_of_the_weights(model):
    config, weights = model
    names = family_of(config).names
    assert names.embedding_weight in weights and names.head_weight in weights
    modules = (names.attention_norm, names.query, names.key, names.value, names.attention_output)
    modules += (names.mlp_norm, names.gate, names.up, names.down)
    modules += (names.query_norm, names.key_norm) * family_of(config).megatron["qk_layernorm"]
    layer = {f"{names.layers}.0.{module}" for module in modules}
    assert {name.rpartition(".")[0] for name in weights if name.startswith(f"{names.layers}.0.")} == layer
    assert f"{names.final_norm}.weight" in weights


def test_the_engine_s_classes_exist_and_its_fused_modules_hold_what_they_say(model):
    family = family_of(model[0])
    assert dict(family.fused) == {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    assert all(path.startswith("sglang.srt.models.") for path in family.engine_models)
    assert importlib.util.find_spec("sglang") is not None


def test_its_own_models_have_no_problem_and_a_drafter_of_the_same_width(model):
    config, family = model[0], family_of(model[0])
    assert list(family.problems(config)) == []
    assert family.architectures == (type(tiny_model(config)).__name__,) and family.model_type == config.model_type
    assert family.drafter_width(config) == config.intermediate_size
    config.architectures = None
    assert list(family.problems(config)) == [], "an old config that does not say it"


def test_every_problem_of_a_config_is_told(model):
    config = model[0]
    config.hidden_act, config.attention_dropout, config.architectures = "gelu", 0.1, ["A", "B"]
    first, *others = family_of(config).problems(config)
    assert first.startswith("architectures A, B, but only ") and len(others) == 2


def test_a_family_is_that_of_the_config_and_the_key_is_named():
    assert family_of(tiny_config("qwen3")) is FAMILIES["qwen3"]
    unknown = SimpleNamespace(model_type="gpt2")
    with pytest.raises(ConfigError, match="^model.path: model_type 'gpt2' is not supported"):
        family_of(unknown)
    with pytest.raises(ConfigError, match="^drafter.path: model_type 'gpt2' is not supported"):
        family_of(unknown, "drafter.path")


def test_all_families_name_the_output_layer_alike():
    assert head_weights() == ("lm_head.weight",)
