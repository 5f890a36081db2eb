"""rollout/sglang/weights.py: updates that are refused before anything is sent to sglang."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError, EngineError
from respec_trainer.rollout.engine import TensorSpec
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.rollout.sglang.weights import WeightUpdater, weight_shapes


@pytest.fixture
def updater(tmp_path):
    """A WeightUpdater without an engine, so that a sent message would fail."""
    for folder, name in (("target", "model.norm.weight"), ("drafter", "norm.weight")):
        (tmp_path / folder).mkdir()
        save_file({name: torch.ones(4), "d2t": torch.zeros(3)}, tmp_path / folder / "a.safetensors", {"format": "pt"})
    save_file({"lm_head.weight": torch.ones(5, 4)}, tmp_path / "target/b.safetensors")
    shape = SpeculationConfig(steps=3, topk=1, draft_tokens=4)
    settings = EngineSettings(str(tmp_path / "target"), str(tmp_path / "drafter"), speculation=shape)
    return WeightUpdater(None, settings)


def test_shapes_are_read_from_every_file(updater, tmp_path):
    expected = {"model.norm.weight": (4,), "lm_head.weight": (5, 4), "d2t": (3,)}
    assert weight_shapes(str(tmp_path / "target")) == expected
    assert weight_shapes(str(tmp_path)) == {}


def test_a_damaged_file_is_named_before_the_engine_reads_it(updater, tmp_path):
    (tmp_path / "target/c.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="c.safetensors cannot be read"):
        weight_shapes(str(tmp_path / "target"))


@pytest.mark.parametrize(
    ("role", "name", "size", "message"),
    [
        ("target", "norm.weight", 4, "the target model has no norm.weight"),
        ("draft", "model.norm.weight", 4, "the draft model has no model.norm.weight"),
        ("draft", "d2t", 3, "d2t cannot be updated"),
        ("draft", "embed_tokens.weight", 4, "embed_tokens.weight cannot be updated"),
        ("target", "model.norm.weight", 5, r"has shape \(5,\), but the model's is \(4,\)"),
    ],
)
def test_bad_weights(updater, role, name, size, message):
    updater.role = role
    with pytest.raises(EngineError, match=message):
        updater.receive_tensors([(name, torch.ones(size))], role)
    with pytest.raises(EngineError, match=message):
        updater.receive_broadcast([TensorSpec(name, "float32", (size,))], role, "group")


def test_bad_order(updater):
    with pytest.raises(EngineError, match="outside of an update"):
        updater.receive_tensors([], "target")
    with pytest.raises(EngineError, match="outside of an update"):
        updater.end("target")
    updater.role = "draft"
    with pytest.raises(EngineError, match="update of the draft weights is open"):
        updater.begin("target")
    with pytest.raises(EngineError, match="during an update of the draft"):
        updater.receive_tensors([], "target")
