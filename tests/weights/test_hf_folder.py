from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from respec_trainer.errors import ConfigError
from respec_trainer.weights import hf_folder
from respec_trainer.weights.hf_folder import HFFolder, some
from respec_trainer.weights.safetensors_io import MappedFile

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
    with pytest.raises(ConfigError, match="holds neither model.safetensors nor model.safetensors.index.json$"):
        HFFolder(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="cannot be read"):
        HFFolder(tmp_path)


def test_dtypes_files_and_names_come_from_the_index(tmp_path):
    save_file({"a": A, "c": B.half()}, tmp_path / "one.safetensors")
    save_file({"b": B.bfloat16()}, tmp_path / "two.safetensors")
    held = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    with HFFolder(tmp_path) as files:
        files.check_index()
        assert files.files() == ["one.safetensors", "two.safetensors"] and files.names() == set("abc")
        assert [files.dtype(name) for name in "abc"] == [torch.float32, torch.bfloat16, torch.float16]
        assert files.shape("b") == (5,)


def test_a_file_is_opened_once_and_freed_at_the_end(tmp_path, monkeypatch):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    opened = []
    monkeypatch.setattr(hf_folder, "MappedFile", lambda path: opened.append(path) or MappedFile(path))
    with HFFolder(tmp_path) as files:
        for name in "abab":
            files.read(name)
        assert opened == [tmp_path / "model.safetensors"]
    files.read("a")
    assert len(opened) == 2, "mapped again after the statement"


def test_the_first_names_are_listed_and_the_others_counted():
    assert some("b") == "b" and some("cba") == "a, b, c" and some("dbca") == "a, b, c and 1 more"
    assert some({"x", "y", "z", "w", "v"}) == "v, w, x and 2 more"


@pytest.mark.parametrize("names", [["b.bin", "a.pt"], ["d.ckpt", "c.pth", "b.pt", "a.bin"]])
def test_pickles_are_named_where_there_is_nothing_else(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"but {', '.join(sorted(names)[:3])}: pickles may run any code"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 7}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="index.json has no weight_map that can be read.*copy it again"):
        HFFolder(tmp_path)
