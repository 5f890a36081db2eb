"""checkpoint/new_folder.py: a folder is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from respec_trainer.checkpoint.new_folder import carry_over, check_place, new_folder
from respec_trainer.errors import ConfigError, RespecError


def test_the_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "er" / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    assert (tmp_path / "deep" / "er" / "out" / "a").read_text() == "a"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_appeared_there_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_leftovers_go_but_not_a_living_process_folder(tmp_path):
    dead, living = (tmp_path / f".out.partial-{pid}" for pid in (11, 12))
    dead.mkdir()
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.close(held)
    assert {path.name for path in tmp_path.iterdir()} == {"out", living.name}


def test_a_folder_that_another_process_takes_for_a_leftover_is_made_once_more(tmp_path, monkeypatch):
    """Another process removes the folder between making and locking it."""
    flock, taken = fcntl.flock, []

    def late(handle, operation):
        if not taken:
            taken.append(1)
            shutil.rmtree(next(tmp_path.glob(".out.partial-*")))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert taken and (tmp_path / "out" / "a").is_file()


def test_leftovers_that_fill_the_disk_do_not_stand_in_the_way(tmp_path, monkeypatch):
    (tmp_path / ".out.partial-11").mkdir()

    def usage(_):
        return SimpleNamespace(free=0 if list(tmp_path.iterdir()) else 100)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_place(tmp_path / "out", 100)
    with pytest.raises(ConfigError, match="make room"):
        check_place(tmp_path / "out", 101)


def test_only_leftovers_of_the_same_folder_go(tmp_path):
    """Its name may hold characters that a pattern would match others with."""
    for name in (".out[1].partial-11", ".out1.partial-12", ".out[1]2.partial-13"):
        (tmp_path / name).mkdir()
    check_place(tmp_path / "out[1]", 0)
    assert {path.name for path in tmp_path.iterdir()} == {".out1.partial-12", ".out[1]2.partial-13"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported(tmp_path, number):
    with pytest.raises(RespecError, match="out is full"), new_folder(tmp_path / "out"):
        raise OSError(number, "No space left on device, or for this user")
    assert not list(tmp_path.iterdir())


def test_another_error_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert not list(tmp_path.iterdir())


def test_all_but_weights_is_carried_over(tmp_path):
    source = tmp_path / "source"
    kept = ("config.json", "tokenizer.json", "merges.txt", "additional_chat_templates/tool.jinja")
    left = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "original/consolidated.00.pth")
    for name in (*kept, *left, ".git/config"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    carry_over(source, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(kept)


def test_no_handle_of_a_leftover_stays_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        (tmp_path / ".out.partial-11").mkdir()
        check_place(tmp_path / "out", 0)
    with new_folder(tmp_path / "out"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_place_may_be_deep_but_no_file(tmp_path):
    check_place(tmp_path / "a/b/c", 10)
    assert not list(tmp_path.iterdir()), "nothing is made yet"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file exists and is not an empty folder"):
        check_place(tmp_path / "file", 10)
