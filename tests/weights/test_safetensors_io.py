"""weights/safetensors_io.py: the library reads files that were written tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from respec_trainer.errors import ConfigError
from respec_trainer.weights import safetensors_io
from respec_trainer.weights.safetensors_io import (
    PIECE,
    MappedFile,
    SafetensorsWriter,
    Spec,
    file_digest,
    file_names,
    open_safetensors,
    plan_files,
)

TENSORS = {
    "ids": torch.arange(-3, 4),
    "rows": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.ones(3).bfloat16(),
    "flags": torch.tensor([True, False, True]),
}
SPECS = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, SPECS, {"made": "here"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "here"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)
    assert writer.size == path.stat().st_size
    assert writer.digest == file_digest(path)


def test_a_tensor_of_several_pieces_and_one_that_is_not_contiguous(tmp_path):
    large = torch.arange(PIECE // 4 + 1000, dtype=torch.float32)
    turned = torch.arange(12.0).view(3, 4).t()
    specs = {"large": Spec(large.dtype, tuple(large.shape)), "turned": Spec(turned.dtype, (4, 3))}
    with SafetensorsWriter(tmp_path / "a.safetensors", specs) as writer:
        writer.write("large", large)
        writer.write("turned", turned)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("large"), large)
        assert torch.equal(file.get_tensor("turned"), turned)
    assert writer.digest == file_digest(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("name", "tensor"), [("rows", TENSORS["rows"]), ("ids", TENSORS["ids"].int())])
def test_a_tensor_out_of_turn_or_of_another_kind_is_refused(tmp_path, name, tensor):
    with pytest.raises(ValueError, match="is next"), SafetensorsWriter(tmp_path / "a.safetensors", SPECS) as writer:
        writer.write(name, tensor)


def test_a_file_that_lacks_tensors_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="5 tensors were not written"),
        SafetensorsWriter(tmp_path / "a.safetensors", SPECS) as writer,
    ):
        writer.write("ids", TENSORS["ids"])


def test_no_file_is_written_over(tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "a.safetensors", SPECS)


def test_files_are_filled_in_order_up_to_their_limit():
    sizes = {"a": 40, "b": 60, "c": 1, "d": 500, "e": 99}
    specs = {name: Spec(torch.uint8, (size,)) for name, size in sizes.items()}
    assert plan_files(specs, 100) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert file_names(1) == ["model.safetensors"]
    assert file_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_file_that_is_mapped_anew_reads_the_same(tmp_path, monkeypatch):
    with SafetensorsWriter(tmp_path / "a.safetensors", SPECS) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    opened = []

    def counted(path):
        opened.append(path)
        return open_safetensors(path)

    monkeypatch.setattr(safetensors_io, "MAPPED", 70)
    monkeypatch.setattr(safetensors_io, "open_safetensors", counted)
    file = MappedFile(tmp_path / "a.safetensors")
    first = file.read("rows")
    for _ in range(4):
        assert torch.equal(file.read("rows", (slice(1, 3),)), TENSORS["rows"][1:3])
        assert torch.equal(file.read("ids"), TENSORS["ids"])
    assert torch.equal(first, TENSORS["rows"])  # although the file was mapped again
    assert len(opened) > 2


def test_an_unknown_dtype_is_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="a is of dtype F8_E4M3"):
        MappedFile(tmp_path / "a.safetensors").dtype("a")
