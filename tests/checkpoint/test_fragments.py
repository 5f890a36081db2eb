"""FragmentIndex: entries of a shard are found in any files and fragments, and only those are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from respec_trainer.checkpoint.fragments import FragmentIndex, file_name, fragment_key, parse_key
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import MappedFile

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
WHOLE = torch.arange(100, dtype=torch.float32)
FILES = ["actor/tp1_dp0.safetensors", "actor/tp1_dp1.safetensors"]


def save(folder: Path, *files: dict[str, torch.Tensor]) -> FragmentIndex:
    """Return an index of files of tensor-parallel rank 1, one file for each data-parallel rank."""
    (folder / "actor").mkdir()
    for file, tensors in zip(FILES, files, strict=False):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / file)
    return FragmentIndex(folder, FILES[: len(files)])


@pytest.fixture
def index(tmp_path) -> FragmentIndex:
    """Entries 0 to 40 in one file, 40 to 70 and 70 to 100 in another; and an empty fragment elsewhere."""
    first = {f"master/{NAME}/0": WHOLE[:40], f"master/{NAME}/70": WHOLE[70:]}
    return save(tmp_path, first, {f"master/{NAME}/40": WHOLE[40:70], f"exp_avg/{NAME}/0": -WHOLE, "weight/n/7": WHOLE})


def test_a_key_is_read_as_it_was_made():
    assert fragment_key("exp_avg", "a/b", 12) == "exp_avg/a/b/12"
    assert parse_key(fragment_key("exp_avg", "a/b", 12), Path("file")) == ("exp_avg", "a/b", 12)
    assert file_name(1, 0) == FILES[0]


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 40), (5, 39), (39, 41), (30, 80), (70, 100), (99, 100)])
def test_entries_are_put_together_across_fragments_and_files(index, start, stop):
    assert torch.equal(index.read("master", NAME, 1, start, stop), WHOLE[start:stop])


def test_another_kind_is_another_shard(index):
    assert torch.equal(index.read("exp_avg", NAME, 1, 3, 9), -WHOLE[3:9])


def test_only_what_is_asked_for_is_read(index, monkeypatch):
    read, sizes = MappedFile.read, []

    def counting(file, name, part=()):
        tensor = read(file, name, part)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(MappedFile, "read", counting)
    index.read("master", NAME, 1, 38, 43)
    assert sizes == [2, 3]


def test_an_empty_fragment_hides_no_other(tmp_path):
    parts = {f"weight/{NAME}/0": WHOLE[:60], f"weight/{NAME}/60": WHOLE[60:]}
    index = save(tmp_path, {f"weight/{NAME}/0": WHOLE[:0]}, parts)
    assert torch.equal(index.read("weight", NAME, 1, 10, 90), WHOLE[10:90])


@pytest.mark.parametrize("names", [FILES, FILES[::-1]])
def test_files_may_be_listed_in_any_order(index, names):
    again = FragmentIndex(index.folder, names)
    assert torch.equal(again.read("master", NAME, 1, 0, 100), WHOLE)


@pytest.mark.parametrize(("start", "stop", "missing"), [(0, 101, 100), (100, 101, 100)])
def test_the_first_entry_that_is_missing_is_named(index, start, stop, missing):
    with pytest.raises(ConfigError, match=f"lacks master of {NAME} from entry {missing} on, of tp rank 1"):
        index.read("master", NAME, 1, start, stop)
    with pytest.raises(ConfigError, match="from entry 0 on, of tp rank 0"):
        index.read("master", NAME, 0, 0, 4)


@pytest.mark.parametrize("key", ["master", "master/3", f"master/{NAME}", f"master/{NAME}/-1"])
def test_a_key_of_another_form_is_named(tmp_path, key):
    with pytest.raises(ConfigError, match="tp1_dp0.safetensors: master.* is not a fragment's key, such as weight/"):
        save(tmp_path, {key: WHOLE})


def test_a_file_of_another_name_is_named(tmp_path):
    save_file({f"master/{NAME}/0": WHOLE}, tmp_path / "shard0.safetensors")
    with pytest.raises(ConfigError, match="shard0.safetensors is not named tp0_dp0.safetensors or the like"):
        FragmentIndex(tmp_path, ["shard0.safetensors"])


def test_what_one_fragment_holds_is_mapped_and_not_copied(index, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)  # as a copy would need
    assert torch.equal(index.read("exp_avg", NAME, 1, 3, 9), -WHOLE[3:9])
    assert torch.equal(index.read("master", NAME, 1, 40, 70), WHOLE[40:70])
