"""checkpoint/tensors.py: a checkpoint's state under Hugging Face names, and contents that do not fit the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.tensors import CheckpointTensors, check_contents, open_tensors
from respec_trainer.errors import ConfigError
from respec_trainer.weights.hf_folder import HFFolder
from tests.support.saved_models import random_state, save_checkpoint, save_hf

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained checkpoint of two shards, its config, and its state by kind."""
    root = tmp_path_factory.mktemp("saved")
    hf, config = save_hf(root / "hf", shards=1)
    state = random_state(config)
    return save_checkpoint(root / "step_40", hf, config, state), config, state, hf


def test_the_weights_are_the_float32_ones_and_other_kinds_are_read_by_name(saved):
    folder, config, state, _ = saved
    with open_tensors(folder, config) as weights:
        views = {"master": weights, "exp_avg": weights.of_kind("exp_avg"), "exp_avg_sq": weights.of_kind("exp_avg_sq")}
        for kind, view in views.items():
            assert set(view.names()) == set(state[kind]) and view.folder == folder
            for name, tensor in state[kind].items():
                assert (view.shape(name), view.dtype(name)) == (tuple(tensor.shape), torch.float32)
                assert torch.equal(view.read(name), tensor)
                assert torch.equal(view.read(name, (slice(1, 3),)), tensor[1:3])


def test_a_parameter_is_assembled_once_while_its_tensors_are_read_in_order(saved, monkeypatch):
    folder, config, _, _ = saved
    shard, read = MegatronFolder.shard, []
    monkeypatch.setattr(MegatronFolder, "shard", lambda self, *key: read.append(key) or shard(self, *key))
    weights = CheckpointTensors(MegatronFolder(folder), config)
    for name in weights.names():
        weights.read(name)
        weights.read(name)
    assert len(read) == len(set(read)) == 2 * len(MegatronFolder(folder).shapes), "two shards of each"
    first = next(iter(weights.names()))
    weights.read(first)
    weights.of_kind("exp_avg").read(first)
    weights.read(first)
    assert len(read) == len(set(read)) + 2 * 2, "kinds share the memory of one parameter"


def test_a_hugging_face_folder_is_opened_as_one(saved):
    _, config, _, hf = saved
    with open_tensors(hf, config) as files:
        assert isinstance(files, HFFolder)
        check_contents(files, config)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda held: held.pop(DOWN), f"the weights in .* lack {DOWN}; does config.json belong to them"),
        (lambda held: held.update({"model.more": torch.ones(1)}), "hold, with no place in the model, model.more; does"),
        (
            lambda held: held.update({DOWN: torch.ones(2, 3)}),
            rf"{DOWN} in .* is of shape \(2, 3\), but config.json makes",
        ),
    ],
)
def test_contents_of_another_model_are_named_with_the_key(saved, tmp_path, edit, words):
    _, config, _, hf = saved
    held = load_file(hf / "model.safetensors")
    edit(held)
    save_file(held, tmp_path / "model.safetensors")
    for key in ("", "model.path: "):
        with HFFolder(tmp_path) as files, pytest.raises(ConfigError, match=f"^{key}.*{words}"):
            check_contents(files, config, key)


def test_what_some_exporters_add_is_passed_over(saved, tmp_path):
    _, config, _, hf = saved
    held = load_file(hf / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(held, tmp_path / "model.safetensors")
    with HFFolder(tmp_path) as files:
        check_contents(files, config)
