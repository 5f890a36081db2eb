"""checkpoint/files.py: files that are whole, aligned, never overwritten, and named in errors."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from respec_trainer.checkpoint.files import can_hold, facts_of, named_errors, write_tensors, write_text
from respec_trainer.weights.safetensors_io import file_digest

TENSORS = {
    "byte": torch.arange(3, dtype=torch.uint8),
    "half": torch.arange(5).bfloat16(),
    "view": torch.arange(12.0).view(3, 4).t(),
    "long": torch.arange(2),
    "gradient": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_are_written_in_full_and_begin_where_their_elements_may(tmp_path):
    path = tmp_path / "a.safetensors"
    facts = write_tensors(path, TENSORS, {"tree": "{}"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"tree": "{}"}
        assert [file.get_tensor(name).data_ptr() % tensor.element_size() for name, tensor in TENSORS.items()] == [0] * 5
        places = sorted((file.get_tensor(name).data_ptr(), -tensor.element_size()) for name, tensor in TENSORS.items())
    assert [size for _, size in places] == sorted(size for _, size in places), "the widest first"
    assert facts == {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)} == facts_of(path)


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "mine"
    path.write_text("precious")
    for write in (lambda: write_text(path, "x"), lambda: write_tensors(path, TENSORS)):
        with pytest.raises(FileExistsError):
            write()
    assert path.read_text() == "precious"


def test_text_and_its_facts(tmp_path):
    assert write_text(tmp_path / "a", "four")["bytes"] == 4
    assert (tmp_path / "a").read_text() == "four"


def test_an_error_of_writing_has_a_path_and_keeps_its_own(tmp_path):
    with pytest.raises(OSError, match="full") as caught, named_errors(tmp_path / "a"):
        raise OSError(28, "full")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError) as caught, named_errors(tmp_path / "a"):
        raise OSError(2, "absent", "other")
    assert caught.value.filename == "other"


def test_dtypes_that_a_file_can_hold():
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
    assert all(map(can_hold, dtypes)) and not can_hold(torch.complex64)
