from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from respec_trainer.errors import ConfigError
from respec_trainer.weights.hf_folder import HFFolder

A, B = torch.arange(12.0).view(3, 4), torch.arange(5.0)


def test_reads_whole_tensors_and_parts(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    with HFFolder(tmp_path) as files:
        assert files.names() == {"a", "b"}
        assert files.shape("a") == (3, 4)
        assert torch.equal(files.read("b"), B)
        assert torch.equal(files.read("a", (slice(1, 3),)), A[1:3])
        assert torch.equal(files.read("a", (slice(None), slice(2, 4))), A[:, 2:4])


def test_reads_several_files_and_opens_only_those_asked_for(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "absent.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with HFFolder(tmp_path) as files:
        assert torch.equal(files.read("a"), A)
        with pytest.raises(ConfigError, match="absent.safetensors"):
            files.read("b")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        HFFolder(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="cannot be read"):
        HFFolder(tmp_path)
