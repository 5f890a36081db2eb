"""weights/safetensors_io.py: the library reads files that were written tensor by tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
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
from tests.support.disks import full_disk

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


def write(path, specs=SPECS, metadata=None) -> SafetensorsWriter:
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name in specs:
            writer.write(name, TENSORS[name])
    return writer


@pytest.mark.parametrize("length", range(9))
def test_the_header_is_the_formats_and_tensors_begin_at_multiples_of_eight(tmp_path, length):
    path = tmp_path / "a.safetensors"
    write(path, {"rows": SPECS["rows"], "flags": SPECS["flags"]}, {"a": "x" * length})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0 and json.loads(content[8 : 8 + size]) == {
        "__metadata__": {"a": "x" * length},
        "rows": {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60]},
        "flags": {"dtype": "BOOL", "shape": [3], "data_offsets": [60, 63]},
    }
    assert len(content) == 8 + size + 63


def test_without_metadata_a_file_says_that_torch_reads_it(tmp_path):
    write(tmp_path / "a.safetensors", {"ids": SPECS["ids"]})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_header_above_the_formats_limit_is_refused_before_there_is_a_file(tmp_path, monkeypatch):
    write(tmp_path / "a.safetensors")
    size = 8 + int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    monkeypatch.setattr(safetensors_io, "HEADER_LIMIT", size)
    write(tmp_path / "c.safetensors")
    monkeypatch.setattr(safetensors_io, "HEADER_LIMIT", size - 1)
    with pytest.raises(ValueError, match=r"6 tensors make a header of \d+ bytes, above the format's limit"):
        write(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_content_goes_to_the_disk_while_more_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "PIECE", 16)
    monkeypatch.setattr(safetensors_io, "WRITEBACK", 32)
    sent = []
    monkeypatch.setattr("os.posix_fadvise", lambda handle, start, length, advice: sent.append((start, length, advice)))
    writer = write(tmp_path / "a.safetensors")
    assert {advice for *_, advice in sent} == {os.POSIX_FADV_DONTNEED}
    ends = [start + length for start, length, _ in sent]
    assert [start for start, *_ in sent] == [0, *ends[:-1]], "each byte once"
    assert all(32 < length <= 48 for _, length, _ in sent) and writer.size - ends[-1] <= 48
    assert (
        writer.digest == file_digest(tmp_path / "a.safetensors")
        and writer.size == (tmp_path / "a.safetensors").stat().st_size
    )


def test_a_disk_that_takes_only_part_of_a_piece_is_given_the_rest(tmp_path, monkeypatch):
    original = Path.open

    class Slow:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, piece):
            return self.file.write(piece[:7])

    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: Slow(original(path, *a, **k)) if "xb" in a else original(path, *a, **k)
    )
    writer = write(tmp_path / "a.safetensors")
    assert writer.digest == file_digest(tmp_path / "a.safetensors")
    assert torch.equal(MappedFile(tmp_path / "a.safetensors").read("rows"), TENSORS["rows"])


def test_an_error_of_writing_is_raised_by_the_next_call_or_at_the_end(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left"), full_disk():
        write(tmp_path / "a.safetensors")


def test_an_exception_of_the_caller_is_not_hidden_and_nothing_is_said_of_missing_tensors(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "a.safetensors", SPECS):
        raise KeyError("mine")


@pytest.mark.parametrize(("limit", "opened"), [(59, 4), (60, 2), (119, 2), (120, 2), (239, 1), (1000, 1)])
def test_a_file_is_mapped_again_after_so_many_bytes(tmp_path, monkeypatch, limit, opened):
    """Each of four reads takes 60 bytes."""
    write(tmp_path / "a.safetensors")
    calls = []
    monkeypatch.setattr(safetensors_io, "MAPPED", limit)
    monkeypatch.setattr(safetensors_io, "open_safetensors", lambda path: calls.append(path) or open_safetensors(path))
    file = MappedFile(tmp_path / "a.safetensors")
    for _ in range(4):
        file.read("rows")
    assert len(calls) == opened


@pytest.mark.parametrize("content", [b"PK\x03\x04...", b"\x80\x02..."])
def test_a_pickle_is_called_one_and_other_content_is_told_by_its_digest(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read: .*; it is a pickle, as torch.save writes"):
        open_safetensors(path)
    path.write_bytes(b"PK\x04\x03" + bytes(1000))
    with pytest.raises(ConfigError, match=f"; it holds 1,004 bytes with XXH3-128 {file_digest(path)}: compare"):
        open_safetensors(path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read: [^;]*$"):
        open_safetensors(path)


def test_a_digest_is_of_the_whole_file(tmp_path):
    path = tmp_path / "a"
    for size in (0, 1, PIECE, PIECE + 1):
        path.write_bytes(os.urandom(size))
        assert file_digest(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_files_are_filled_to_the_last_byte():
    specs = {name: Spec(torch.float32, (size,)) for name, size in {"a": 25, "b": 1, "c": 24, "d": 1}.items()}
    assert plan_files(specs, 100) == [["a"], ["b", "c"], ["d"]]
    assert plan_files({}, 100) == []
    assert file_names(12)[9] == "model-00010-of-00012.safetensors" and len(file_names(12)) == 12
