from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.models.rules import padded_vocab_size
from respec_trainer.weights.hf_map import (
    hf_shapes,
    hf_views,
    megatron_shapes,
    megatron_shard,
    parameter_layout,
    to_hf,
)

LAYER = "decoder.layers.3."
NAMES = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "output_layer.weight": ["lm_head.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    LAYER + "input_layernorm.weight": ["model.layers.3.input_layernorm.weight"],
    LAYER + "pre_mlp_layernorm.weight": ["model.layers.3.post_attention_layernorm.weight"],
    LAYER + "self_attention.linear_qkv.weight": [f"model.layers.3.self_attn.{x}_proj.weight" for x in "qkv"],
    LAYER + "self_attention.linear_proj.weight": ["model.layers.3.self_attn.o_proj.weight"],
    LAYER + "mlp.linear_fc1.weight": [f"model.layers.3.mlp.{x}_proj.weight" for x in ("gate", "up")],
    LAYER + "mlp.linear_fc2.weight": ["model.layers.3.mlp.down_proj.weight"],
}
OWN = {
    "qwen2": {LAYER + "self_attention.linear_qkv.bias": [f"model.layers.3.self_attn.{x}_proj.bias" for x in "qkv"]},
    "qwen3": {
        LAYER + "self_attention.q_layernorm.weight": ["model.layers.3.self_attn.q_norm.weight"],
        LAYER + "self_attention.k_layernorm.weight": ["model.layers.3.self_attn.k_norm.weight"],
    },
    "llama": {},
}


def names_of(config) -> dict[str, list[str]]:
    """Return Megatron's parameters of one layer and outside the layers, with the Hugging Face tensors of each."""
    return NAMES | OWN[config.model_type]


def hf_shape(name: str, config) -> tuple[int, ...]:
    """Return the shape of this tensor in transformers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    kind = name.split(".")[-2]
    shapes = {"embed_tokens": (config.vocab_size, hidden), "lm_head": (config.vocab_size, hidden)}
    shapes |= {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    shape = shapes.get(kind, (hidden,))
    return shape[:1] if name.endswith("bias") else shape


def make_weights(config) -> dict[str, torch.Tensor]:
    """Return tensors whose entries are all different."""
    weights, start = {}, 1
    for names in names_of(config).values():
        for name in names:
            shape = hf_shape(name, config)
            size = int(torch.Size(shape).numel())
            weights[name] = torch.arange(start, start + size, dtype=torch.float64).view(shape)
            start += size
    return weights


def make_config(**changes) -> SimpleNamespace:
    shape = {
        "hidden_size": 6,
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return SimpleNamespace(**({"model_type": "qwen2", "head_dim": 2, "vocab_size": 7} | shape | changes))


@st.composite
def configs(draw) -> tuple[SimpleNamespace, int]:
    tp = draw(st.sampled_from((1, 2, 4, 8)))
    groups = draw(st.sampled_from((1, 2, 3, 4, 8)))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((2, 4)))
    if heads % tp or (heads + 2 * groups) * head_dim % tp:
        heads, groups = 8, 4
    config = make_config(
        model_type=draw(st.sampled_from(sorted(OWN))),
        hidden_size=draw(st.integers(1, 5)),
        intermediate_size=tp * draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 20)),
    )
    return config, tp


@given(configs())
@settings(max_examples=60, deadline=None)
def test_shards_of_all_ranks_give_back_every_tensor(case):
    config, tp = case
    weights = make_weights(config)
    for name, sources in names_of(config).items():
        shards = [megatron_shard(name, lambda n, i: weights[n][i], config, rank, tp) for rank in range(tp)]
        assert len({shard.shape for shard in shards}) == 1
        returned = to_hf(name, shards, config)
        assert [source for source, _ in returned] == sources
        for source, tensor in returned:
            assert torch.equal(tensor, weights[source])


@given(configs())
@settings(max_examples=30, deadline=None)
def test_a_shard_reads_no_more_than_it_holds(case):
    config, tp = case
    weights = make_weights(config)
    for name in names_of(config):
        for rank in range(tp):
            taken = 0

            def read(source, index):
                nonlocal taken
                part = weights[source][index]
                taken += part.numel()
                return part

            assert taken <= megatron_shard(name, read, config, rank, tp).numel()


@given(configs())
@settings(max_examples=30, deadline=None)
def test_views_are_what_a_copy_is(case):
    config, _ = case
    weights = make_weights(config)
    for name in names_of(config):
        whole = megatron_shard(name, lambda n, i: weights[n][i], config, 0, 1)
        views = hf_views(name, whole, config)
        assert (views is None) == ("linear_qkv" in name and config.num_key_value_heads > 1)
        for source, view in (views or {}).items():
            assert torch.equal(view, weights[source]) and view.is_contiguous()
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_queries_keys_and_values_lie_by_group():
    config = make_config()
    weights = make_weights(config)
    q, k, v = (weights[f"model.layers.3.self_attn.{x}_proj.weight"] for x in "qkv")
    second = megatron_shard(LAYER + "self_attention.linear_qkv.weight", lambda n, i: weights[n][i], config, 1, 2)
    assert torch.equal(second, torch.cat([q[4:8], k[2:4], v[2:4]]))


def test_each_rank_holds_the_same_rows_of_gate_and_up():
    config = make_config()
    weights = make_weights(config)
    gate, up = (weights[f"model.layers.3.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    second = megatron_shard(LAYER + "mlp.linear_fc1.weight", lambda n, i: weights[n][i], config, 1, 2)
    assert torch.equal(second, torch.cat([gate[4:], up[4:]]))


def test_padded_vocabulary_is_zero_and_stays_inside():
    config = make_config(vocab_size=5)
    assert padded_vocab_size(config, 4) == 8
    weights = make_weights(config)
    name = "embedding.word_embeddings.weight"
    shards = [megatron_shard(name, lambda n, i: weights[n][i], config, rank, 4) for rank in range(4)]
    assert shards[3].shape == (2, 6)
    assert not shards[3].any()
    assert to_hf(name, shards, config)[0][1].shape == (5, 6)


def test_a_replicated_parameter_needs_one_shard():
    norm = torch.ones(6)
    ((name, copied),) = to_hf("decoder.final_layernorm.weight", [norm], make_config())
    assert name == "model.norm.weight" and torch.equal(copied, norm)
    assert parameter_layout("decoder.final_layernorm.weight", make_config(), 2).dim is None


def test_head_size_is_derived_where_the_config_does_not_name_it():
    config = make_config(hidden_size=8, head_dim=None)
    layout = parameter_layout(LAYER + "self_attention.linear_proj.weight", config, 1)
    assert layout.extents() == {"model.layers.3.self_attn.o_proj.weight": 8}


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.router.weight",
        "rotary.inv_freq",
        "decoder.layers.x.y",
        "decoder.layers.0.self_attention.q_layernorm.weight",  # of another family
    ],
)
def test_unknown_parameters_are_refused(name):
    with pytest.raises(KeyError, match="counterpart.*in qwen2"):
        parameter_layout(name, make_config(), 1)


@pytest.mark.parametrize("family", OWN)
def test_the_shards_of_a_family_are_its_own_parameters_in_the_order_of_its_tensors(family):
    config = make_config(model_type=family, num_hidden_layers=4, tie_word_embeddings=False)
    held = megatron_shapes(config, 1)
    kinds = [name.removeprefix(LAYER) for name in held if name.startswith(LAYER)]
    own = [name.removeprefix(LAYER) for name in OWN[family]]
    norm, attention = ["input_layernorm.weight"], ["self_attention.linear_qkv.weight", *own]
    mlp = ["pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    assert kinds == [*norm, *attention, "self_attention.linear_proj.weight", *mlp]
    shapes = {
        source: shape for name, shape in held.items() for source, shape in hf_shapes(name, shape, config, 1).items()
    }
    assert all(shapes[source] == hf_shape(source, config) for names in names_of(config).values() for source in names)
