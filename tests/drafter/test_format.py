"""drafter/format.py and compatibility.py: the folder round trip, and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.drafter import format as drafter_format
from respec_trainer.drafter.format import check_drafter_folder, drafter_config, load_drafter, save_drafter
from respec_trainer.errors import ConfigError, RespecError
from tests.drafter.test_shape import LLAMA3
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter

TARGET = target_config("qwen3")
NAMES = {
    "fc.weight": [64, 192],
    "midlayer.input_layernorm.weight": [64],
    "midlayer.hidden_norm.weight": [64],
    "midlayer.self_attn.q_proj.weight": [128, 128],
    "midlayer.self_attn.k_proj.weight": [64, 128],
    "midlayer.self_attn.v_proj.weight": [64, 128],
    "midlayer.self_attn.o_proj.weight": [64, 128],
    "midlayer.post_attention_layernorm.weight": [64],
    "midlayer.mlp.gate_proj.weight": [96, 64],
    "midlayer.mlp.up_proj.weight": [96, 64],
    "midlayer.mlp.down_proj.weight": [64, 96],
    "norm.weight": [64],
    "lm_head.weight": [64, 64],
    "d2t": [64],
    "t2d": [131],
}


@pytest.fixture
def folder(tmp_path):
    save_drafter(tiny_drafter(TARGET), DRAFT_IDS, tmp_path / "drafter")
    return tmp_path / "drafter"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_tensors(folder, **changes):
    """Replace tensors; `__` in a name stands for a dot, and None removes the tensor."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = load_file(folder / "model.safetensors") | named
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def test_the_file_holds_exactly_the_tensors_of_the_format(folder):
    tensors = load_file(folder / "model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == NAMES
    maps = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(t.dtype == maps.get(name, torch.bfloat16) for name, t in tensors.items())
    assert torch.equal(tensors["d2t"] + torch.arange(64), DRAFT_IDS)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), DRAFT_IDS)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]  # no partial folder is left


def test_round_trip(folder):
    drafter, ids = load_drafter(folder, TARGET)
    assert torch.equal(ids, DRAFT_IDS)
    saved = tiny_drafter(TARGET).state_dict()
    for name, tensor in drafter.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name].bfloat16().float()), name
    assert drafter.shape == tiny_drafter(TARGET).shape
    assert load_drafter(folder, TARGET, dtype=None)[0].fc.weight.dtype == torch.bfloat16


def test_a_loaded_drafter_learns(folder):
    drafter, _ = load_drafter(folder, TARGET)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 5, 192, generator=generator)
    drafter.logits(next(drafter.unroll(*inputs, 1))).sum().backward()
    assert all(p.grad is not None for p in drafter.parameters())


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, LLAMA3])
@pytest.mark.parametrize("order", [1, -1])
def test_transformers_reads_the_same_rope_as_from_the_target(tmp_path, rope, order):
    """SGLang shares one rope cache between target and drafter if their numbers and the order of the keys agree."""
    from transformers import AutoConfig

    target = target_config("llama", rope_parameters=dict(list(rope.items())[::order]), head_dim=32)
    save_drafter(tiny_drafter(target), DRAFT_IDS, tmp_path / "drafter")
    read = AutoConfig.from_pretrained(tmp_path / "drafter")
    assert list(read.rope_parameters.items()) == list(target.rope_parameters.items())
    for key in ("hidden_size", "vocab_size", "max_position_embeddings", "head_dim", "bos_token_id", "eos_token_id"):
        assert getattr(read, key) == getattr(target, key)
    assert read.draft_vocab_size == 64 and read.num_hidden_layers == 1
    load_drafter(tmp_path / "drafter", target)


def test_the_older_spelling_of_rope_is_read_too(folder):
    edit_config(folder, rope_parameters=...)
    check_drafter_folder(folder, TARGET)
    edit_config(folder, rope_theta=500.0)
    with pytest.raises(ConfigError, match="rope_theta"):
        check_drafter_folder(folder, TARGET)


def test_feature_layers_are_named_only_where_they_are_not_the_engine_s_choice(tmp_path):
    assert drafter_config(tiny_drafter(TARGET).shape)["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    deep = target_config(layers=8)
    assert "eagle_config" not in drafter_config(tiny_drafter(deep).shape)
    save_drafter(tiny_drafter(deep), DRAFT_IDS, tmp_path / "drafter")
    assert load_drafter(tmp_path / "drafter", deep)[0].shape.feature_layers == (1, 3, 4)


def test_the_target_s_embedding_may_be_there(folder):
    edit_tensors(folder, embed_tokens__weight=torch.zeros(131, 64))
    load_drafter(folder, TARGET)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("hidden_size", 128, "hidden_size .* 128, but 64"),
        ("head_dim", 16, "head_dim .* 16, but 32"),
        ("head_dim", ..., "head_dim .* 16, but 32"),
        ("vocab_size", 256, "vocab_size .* 256, but 131"),
        ("max_position_embeddings", 2048, "max_position_embeddings .* 2048, but 256"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, "rope_theta"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, "rope_scaling"),
        ("draft_vocab_size", None, "no draft_vocab_size"),
        ("draft_vocab_size", 100, "draft_vocab_size=100"),
        ("intermediate_size", ..., "no intermediate_size"),
        ("num_hidden_layers", 2, "num_hidden_layers=2"),
        ("tie_word_embeddings", True, "tie_word_embeddings=True"),
        ("attention_bias", True, "attention_bias=True"),
        ("norm_output", True, "norm_output=True"),
        ("eagle_config", {"norm_before_fc": True}, "norm_before_fc=True"),
        ("eagle_config", {"use_aux_hidden_state": False}, "use_aux_hidden_state"),
        ("eagle_config", ..., "eagle_aux_hidden_state_layer_ids .* default"),  # not three different layers of 4
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, "eagle_aux_hidden_state_layer_ids .* 0 to 2"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}, "three different layers"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [0, 1]}, "three different layers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, key, value, words):
    edit_config(folder, **{key: value})
    for read in (check_drafter_folder, load_drafter):
        with pytest.raises(ConfigError, match=words):
            read(folder, TARGET)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("fc__weight", None, "lacks fc.weight"),
        ("t2d", None, "lacks t2d"),
        ("midlayer__self_attn__q_proj__bias", torch.zeros(128), "unknown midlayer.self_attn.q_proj.bias"),
        ("lm_head__weight", torch.zeros(128, 64), r"lm_head.weight .* \[128, 64\], .* \[64, 64\]"),
        ("d2t", DRAFT_IDS, "d2t .* is a difference"),  # target ids themselves: a common mistake
        ("d2t", torch.arange(64, 0, -1), "disagree"),
        ("d2t", DRAFT_IDS - torch.arange(64) - 5, "disagree"),
        ("d2t", torch.zeros(64), "integers"),
        ("t2d", torch.ones(131, dtype=torch.bool), "disagree"),
        ("t2d", torch.ones(131, dtype=torch.int64), "booleans"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, name, tensor, words):
    edit_tensors(folder, **{name: tensor})
    for read in (check_drafter_folder, load_drafter):
        with pytest.raises(ConfigError, match=words) as caught:
            read(folder, TARGET)
        assert "tools/train_drafter.py" in str(caught.value)  # every refusal names the remedy


def test_missing_and_unreadable_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match="no folder .*absent"):
        check_drafter_folder(tmp_path / "absent", TARGET)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither model.safetensors"):
        check_drafter_folder(folder, TARGET)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        check_drafter_folder(folder, TARGET)


def test_nothing_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_drafter(tiny_drafter(TARGET, seed=3), DRAFT_IDS, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    drafter = tiny_drafter(TARGET)
    with torch.no_grad():
        drafter.norm.weight[3] = torch.nan
    with pytest.raises(RespecError, match="norm.weight"):
        save_drafter(drafter, DRAFT_IDS, tmp_path / "drafter")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_is_not_given_its_name(tmp_path, monkeypatch):
    def corrupt(tensors, path, metadata):
        save_file(tensors | {"fc.weight": tensors["fc.weight"] + 1}, path, metadata)

    monkeypatch.setattr(drafter_format, "save_file", corrupt)
    with pytest.raises(RespecError, match="fc.weight does not read back"):
        save_drafter(tiny_drafter(TARGET), DRAFT_IDS, tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()


def test_draft_ids_must_be_as_many_as_the_head_s_rows(tmp_path):
    with pytest.raises(ValueError, match="10 draft ids"):
        save_drafter(tiny_drafter(TARGET), DRAFT_IDS[:10], tmp_path / "drafter")
