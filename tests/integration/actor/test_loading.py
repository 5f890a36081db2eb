"""Refusals of a folder's weights, before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.errors import ConfigError
from tests.support.models import save_tiny_model, tiny_config, tiny_run_config
from tests.support.processes.ranks import run_ranks


def load(folder: Path, dtype: str = "fp32") -> str | dict[str, torch.Tensor]:
    """Return the loaded weights, or the ConfigError's text."""
    from respec_trainer.actor.loading import load_hf_config, load_weights
    from respec_trainer.actor.model import build_model
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel

    config = tiny_run_config(folder, {"model.dtype": dtype})
    topology = init_parallel(config)
    hf_config = load_hf_config(folder)
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = build_model(hf_config, config.actor, wanted, topology.device, config.rollout.sampling)
    try:
        load_weights(model, hf_config, folder, topology)
        return dict(model.state_dict())
    except ConfigError as error:
        return str(error)
    finally:
        shutdown_parallel()


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "model", tiny_config("qwen2", layers=1))


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_weights_are_converted_to_the_models_dtype(folder):
    (weights,) = run_ranks(1, load, folder, "bf16")
    saved = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(weights["decoder.final_layernorm.weight"], saved.bfloat16())


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda weights: weights.pop("model.layers.0.self_attn.k_proj.bias"))
    assert "lack model.layers.0.self_attn.k_proj.bias" in run_ranks(1, load, folder)[0]


def test_a_tensor_without_a_place_is_named(folder):
    change(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    message = run_ranks(1, load, folder)[0]
    assert "no place" in message
    assert "model.layers.0.self_attn.q_norm.weight" in message


def test_tensors_that_say_nothing_new_are_left_out(folder):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change(folder, lambda weights: weights.update(extra))
    assert isinstance(run_ranks(1, load, folder)[0], dict)


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("vocab_size", 140, "model.embed_tokens.weight"),
        ("vocab_size", 120, "model.embed_tokens.weight"),
        ("intermediate_size", 64, "model.layers.0.mlp.gate_proj.weight"),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_weights_of_another_shape_than_the_configs_are_refused(folder, key, value, tensor):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = run_ranks(1, load, folder)[0]
    assert f"{tensor} in" in message
    assert "config.json makes it" in message
