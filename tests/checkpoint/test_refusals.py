"""Invalid input of conversions: each fault is named before anything is written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.meta import sealed
from respec_trainer.checkpoint.progress import Silent
from respec_trainer.convert.command import main
from respec_trainer.convert.convert import checkpoint_to_hf, reshard, to_megatron
from respec_trainer.drafter.format import save_drafter
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import file_digest
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.models import save_tiny_model
from tests.support.saved_models import random_state, save_checkpoint, save_hf

QUIET = Silent()
ACTOR = "actor/tp1_dp0.safetensors"


@pytest.fixture
def hf(tmp_path):
    return save_hf(tmp_path / "hf")


@pytest.fixture
def checkpoint(tmp_path, hf) -> Path:
    return save_checkpoint(tmp_path / "step_40", *hf, random_state(hf[1]))


def refused(hf, out: Path, message: str, tp: int = 1) -> str:
    """Check the error of a conversion to Megatron, which leaves no files."""
    before = set(out.parent.iterdir())
    with pytest.raises(ConfigError, match=message) as error:
        to_megatron(*hf, out, tp, None, QUIET)
    assert set(out.parent.iterdir()) == before
    return str(error.value)


def checkpoint_refused(folder: Path, config, message: str) -> str:
    before = set(folder.parent.iterdir())
    with pytest.raises(ConfigError, match=message) as error:
        checkpoint_to_hf(MegatronFolder(folder), config, folder.parent / "out", torch.float32, QUIET)
    with pytest.raises(ConfigError, match=message):
        reshard(MegatronFolder(folder), config, folder.parent / "out", 1, QUIET)
    assert set(folder.parent.iterdir()) == before
    return str(error.value)


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_truncated_file_is_named_with_its_checksum(tmp_path, hf):
    path = sorted(hf[0].glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(hf, tmp_path / "out", path.name)
    assert file_digest(path) in message


@pytest.mark.parametrize("content", [b"PK\x03\x04 as torch.save begins", b"\x80\x02 as pickle begins"])
def test_a_pickle_under_another_name_is_not_read(tmp_path, hf, content):
    path = sorted(hf[0].glob("*.safetensors"))[0]
    path.write_bytes(content)
    assert path.name in refused(hf, tmp_path / "out", "it is a pickle")


def test_pickles_are_not_read_where_safetensors_are_missing(tmp_path, hf):
    for path in hf[0].glob("*.safetensors*"):
        path.unlink()
    (hf[0] / "pytorch_model.bin").write_bytes(b"never read")
    refused(hf, tmp_path / "out", "but pytorch_model.bin: pickles may run any code")


def test_a_tensor_missing_in_the_index_is_named(tmp_path, hf):
    edit_index(hf[0], lambda held: held.pop("model.norm.weight"))
    refused(hf, tmp_path / "out", "holds, though the index does not say so, model.norm.weight")


def test_a_tensor_that_only_the_index_has_is_named(tmp_path, hf):
    edit_index(hf[0], lambda held: held.update({"model.more": held["model.norm.weight"]}))
    refused(hf, tmp_path / "out", "lacks model.more")


def test_a_file_that_only_the_index_has_is_named(tmp_path, hf):
    edit_index(hf[0], lambda held: held.update({"model.norm.weight": "absent.safetensors"}))
    refused(hf, tmp_path / "out", "absent.safetensors")


def test_an_index_that_is_none_is_named(tmp_path, hf):
    (hf[0] / "model.safetensors.index.json").write_text("[]")
    refused(hf, tmp_path / "out", "weight_map")


def test_an_output_folder_with_something_in_it_is_left_alone(tmp_path, hf, checkpoint):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused(hf, out, "not an empty folder")
    checkpoint_refused(checkpoint, hf[1], "not an empty folder")
    assert (out / "mine.txt").read_text() == "precious"


def test_an_empty_output_folder_is_filled(tmp_path, hf):
    (tmp_path / "out").mkdir()
    to_megatron(*hf, tmp_path / "out", 1, None, QUIET)
    MegatronFolder(tmp_path / "out").check_digests(QUIET)


def test_a_disk_without_room_is_reported_before(tmp_path, hf, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(hf, tmp_path / "out", "GB are free there; make room")


def flip(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def command_refused(words: list, folder: Path, capsys) -> str:
    """Check the error of a conversion of a checkpoint, which leaves no files."""
    before = set(folder.iterdir())
    assert main([str(word) for word in words]) == 2
    assert set(folder.iterdir()) == before
    return capsys.readouterr().err


# A byte of the header's length, a letter of the header, and bytes of the tensors.
PLACES = [1, 30, 2000, -5, -1000]


@pytest.mark.parametrize("command", ["to-hf", "reshard"])
@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_is_found_with_both_checksums(tmp_path, checkpoint, capsys, command, place):
    path = checkpoint / ACTOR
    saved = file_digest(path)
    flip(path, place, bit=1 << place % 8)
    words = [command, "--checkpoint", checkpoint, "--out", tmp_path / "out", *(["--tp", 1] * (command == "reshard"))]
    message = command_refused(words, tmp_path, capsys)
    assert f"{ACTOR} is corrupted" in message and saved in message and file_digest(path) in message


@pytest.mark.parametrize("name", ["ranks/rank3.safetensors", "hf/tokenizer.json", "state.json"])
def test_a_flipped_bit_in_what_is_carried_over_is_found(tmp_path, hf, checkpoint, name):
    flip(checkpoint / name, -5)
    assert file_digest(checkpoint / name) in checkpoint_refused(checkpoint, hf[1], f"{name} is corrupted")


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_in_a_drafter_is_found(tmp_path, capsys, place):
    target = target_config("qwen3")
    save_tiny_model(tmp_path / "hf", target)
    folder = tmp_path / "step_40"
    save_drafter(tiny_drafter(target), DRAFT_IDS, folder / "drafter", torch.float32)
    save_checkpoint(folder, tmp_path / "hf", target, random_state(target), tp=1, dp=1)
    path = folder / "drafter/model.safetensors"
    saved = file_digest(path)
    flip(path, place)
    message = command_refused(["drafter", "--checkpoint", folder, "--out", tmp_path / "out"], tmp_path, capsys)
    assert "drafter/model.safetensors is corrupted" in message and saved in message and file_digest(path) in message


def test_nothing_appears_before_the_last_file_was_checked(tmp_path, hf, checkpoint, monkeypatch):
    """The check may end before or after the conversion."""
    seen, check = [], MegatronFolder.check_digests

    def slow(self, progress, within=""):
        time.sleep(0.5)
        seen.append((tmp_path / "out").exists())
        check(self, progress, within)
        raise ConfigError("found at last")

    monkeypatch.setattr(MegatronFolder, "check_digests", slow)
    checkpoint_refused(checkpoint, hf[1], "found at last")
    assert seen == [False, False]


def test_a_truncated_shard_is_found_with_both_checksums(tmp_path, hf, checkpoint):
    path = checkpoint / ACTOR
    path.write_bytes(path.read_bytes()[:-4])
    message = checkpoint_refused(checkpoint, hf[1], "tp1_dp0.safetensors holds .* bytes")
    assert file_digest(path) in message


def test_a_missing_shard_is_named(hf, checkpoint):
    (checkpoint / ACTOR).unlink()
    checkpoint_refused(checkpoint, hf[1], "tp1_dp0.safetensors, which meta.json names, is missing")


def test_a_folder_that_was_not_completed_is_none(hf, checkpoint):
    (checkpoint / "meta.json").unlink()
    checkpoint_refused(checkpoint, hf[1], "not a checkpoint, or was not completed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "reads format 2"),
        ({"dtype": "fp16"}, "fp16; this version reads"),
        ({"tp": "2"}, "without a valid tp"),
        ({"tp": 4}, "lacks .* of tensor-parallel rank 2"),
        ({"optimizer": False}, "is of dtype|lacks weight/|holds, though"),
        ({"parameters": {}}, "though meta.json does not say so"),
    ],
)
def test_a_meta_that_does_not_fit_is_refused(hf, checkpoint, change, message):
    path = checkpoint / "meta.json"
    path.write_text(sealed(json.loads(path.read_text()) | change))
    checkpoint_refused(checkpoint, hf[1], message)


def test_a_flipped_bit_in_meta_is_found(hf, checkpoint):
    path = checkpoint / "meta.json"
    text = path.read_text()
    path.write_text(text.replace('"bytes": 1', '"bytes": 3', 1))
    assert path.read_text() != text
    checkpoint_refused(checkpoint, hf[1], "meta.json is corrupted: its contents have the XXH3-128 ")


def rewrite(checkpoint: Path, file: str, edit) -> None:
    """Change the tensors of a file, and its facts in meta.json."""
    tensors = load_file(checkpoint / file)
    edit(tensors)
    save_file(tensors, checkpoint / file)
    meta = json.loads((checkpoint / "meta.json").read_text())
    size = (checkpoint / file).stat().st_size
    meta["files"][file] = {"bytes": size, "xxh3_128": file_digest(checkpoint / file)}
    (checkpoint / "meta.json").write_text(sealed(meta))


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda held: held.pop(f"exp_avg/{NORM}/0"), "follows entry 0 .* entries are missing"),
        (lambda held: held.update({f"exp_avg/{NORM}/1": held[f"exp_avg/{NORM}/0"].clone()}), "entries are there twice"),
        (lambda held: held.update({f"exp_avg/{NORM}/64": torch.ones(1)}), "has 65 entries, not 64"),
        (lambda held: held.update({f"momentum/{NORM}/0": torch.ones(64)}), "holds, though meta.json .* momentum/"),
        (lambda held: held.update({"exp_avg": torch.ones(64)}), "is not a fragment's key"),
        (lambda held: held.update({f"exp_avg/{NORM}/0": torch.ones(16).half()}), "is of dtype torch.float16"),
    ],
)
def test_fragments_that_do_not_cover_a_parameter_once_are_refused(hf, checkpoint, edit, message):
    rewrite(checkpoint, ACTOR, edit)
    checkpoint_refused(checkpoint, hf[1], message)


def test_unlike_copies_of_a_parameter_that_is_not_cut_are_refused(tmp_path, hf, checkpoint):
    rewrite(checkpoint, ACTOR, lambda held: held[f"exp_avg/{NORM}/0"].add_(1))
    with pytest.raises(ConfigError, match="differs between tensor-parallel ranks 0 and 1"):
        reshard(MegatronFolder(checkpoint), hf[1], tmp_path / "out", 1, QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "step_40"}


def test_a_config_of_another_model_is_refused(hf, checkpoint):
    other = type(hf[1]).from_dict(hf[1].to_dict() | {"intermediate_size": 64})
    checkpoint_refused(checkpoint, other, "not of one model")


@pytest.mark.parametrize("name", ["state.json", "hf/tokenizer.json", "ranks/rank0.safetensors"])
def test_a_file_of_another_size_is_found_when_the_checkpoint_is_opened(checkpoint, name):
    """No file is read whole."""
    with (checkpoint / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match=f"{name} holds .* bytes .*; use another checkpoint, or copy this file again"):
        MegatronFolder(checkpoint)


def test_an_empty_fragment_may_be_anywhere(checkpoint):
    """A rank that owns nothing of a parameter may say so, at any place."""
    rewrite(checkpoint, ACTOR, lambda held: held.update({f"exp_avg/{NORM}/7": torch.ones(0)}))
    before = MegatronFolder(checkpoint).shard("exp_avg", NORM, 1)
    assert before.shape == (64,)
