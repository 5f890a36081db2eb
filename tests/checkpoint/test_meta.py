"""meta.json: the first file that differs from it is named, with both facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from respec_trainer.checkpoint.files import facts_of
from respec_trainer.checkpoint.meta import check_files, is_checkpoint, read_meta, sealed
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import file_digest

META = {"step": 3, "tp": 1, "dp": 1, "dtype": "fp32", "optimizer": True, "model": {}, "parameters": {}, "files": {}}


@pytest.fixture
def files(tmp_path) -> dict:
    """Write two files; return their facts."""
    (tmp_path / "first").write_text("first content")
    (tmp_path / "second").write_text("second content")
    return {name: facts_of(tmp_path / name) for name in ("first", "second")}


def test_files_as_they_were_written_have_no_problem(tmp_path, files):
    assert check_files(tmp_path, files, files) is None


def test_only_the_files_that_are_named_are_looked_at(tmp_path, files):
    (tmp_path / "second").unlink()
    assert check_files(tmp_path, files, ["first"]) is None
    assert check_files(tmp_path, files, files) == f"{tmp_path / 'second'}, which meta.json names, is missing"


def test_another_size_is_named_with_both_sizes_and_both_digests(tmp_path, files):
    path = tmp_path / "first"
    path.write_text("first")
    problem = check_files(tmp_path, files, files)
    assert f"{path} holds 5 bytes with XXH3-128 {file_digest(path)}, but meta.json says 13 with " in problem
    assert files["first"]["xxh3_128"] in problem


def test_other_content_of_the_same_size_is_named_with_both_digests(tmp_path, files):
    path = tmp_path / "first"
    path.write_text("First content")
    problem = check_files(tmp_path, files, files)
    assert f"{path} is corrupted: its XXH3-128 is {file_digest(path)}, but meta.json says " in problem
    assert files["first"]["xxh3_128"] in problem


def test_what_was_sealed_is_read_again(tmp_path):
    assert not is_checkpoint(tmp_path)
    (tmp_path / "meta.json").write_text(sealed(META))
    assert is_checkpoint(tmp_path)
    read = read_meta(tmp_path)
    assert {key: read[key] for key in META} == META


def test_the_order_of_its_keys_does_not_matter(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(sealed(META | {"model": {"b": 1, "a": {"d": 2, "c": 3}}}))
    read = read_meta(tmp_path)
    model = {"a": {"c": 3, "d": 2}, "b": 1}
    path.write_text(json.dumps(dict(reversed(read.items())) | {"model": model}))
    assert read_meta(tmp_path) == read


def change(folder: Path, **values) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_meta_that_was_changed_or_cut_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text(sealed(META))
    change(tmp_path, step=4)
    with pytest.raises(ConfigError, match="meta.json is corrupted"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 1, "st')
    with pytest.raises(ConfigError, match="meta.json cannot be read"):
        read_meta(tmp_path)
