"""recipes/folder.py: a folder is made once, complete or not at all, and no other folder is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.recipes.folder import fingerprint, make_once, read_recipe


def maker(text, fail=False):
    def make(folder):
        maker.calls += 1
        folder.mkdir()
        (folder / "weights").write_text(text)
        if fail:
            raise KeyboardInterrupt
        return {"length": len(text)}

    return make


@pytest.fixture(autouse=True)
def _count():
    maker.calls = 0


def test_an_equal_recipe_is_not_made_again(tmp_path):
    folder = tmp_path / "deep" / "out"
    assert make_once(folder, {"a": 1, "b": [2]}, maker("x"))
    assert not make_once(folder, {"b": [2], "a": 1}, maker("y"))
    assert maker.calls == 1 and (folder / "weights").read_text() == "x"
    assert read_recipe(folder)["facts"] == {"length": 1} and read_recipe(folder)["recipe"] == {"a": 1, "b": [2]}


def test_another_recipe_replaces_what_a_recipe_made(tmp_path):
    folder = tmp_path / "out"
    make_once(folder, {"a": 1}, maker("x"))
    (folder / "left over").touch()
    assert make_once(folder, {"a": 2}, maker("yy"))
    assert (folder / "weights").read_text() == "yy" and not (folder / "left over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_making_leaves_what_was_there(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_once(folder, {"a": 1}, maker("x", fail=True))
    assert not list(tmp_path.iterdir())
    make_once(folder, {"a": 1}, maker("x"))
    with pytest.raises(KeyboardInterrupt):
        make_once(folder, {"a": 2}, maker("y", fail=True))
    assert (folder / "weights").read_text() == "x" and not make_once(folder, {"a": 1}, maker("z"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_forever(folder):
    folder.mkdir()
    (folder / "weights").write_text("half")
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_making_leaves_goes_with_the_next(tmp_path, number):
    out = tmp_path / "out"
    make_once(out, {"a": 1}, maker("x"))
    process = multiprocessing.get_context("spawn").Process(target=make_once, args=(out, {"a": 2}, make_forever))
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.*/new/weights")) and time.monotonic() < deadline:
        time.sleep(0.01)
    (left,) = tmp_path.glob(".out.*")
    make_once(out, {"a": 3}, maker("y"))
    assert left.is_dir() and (out / "weights").read_text() == "y", "one at work is left alone"
    os.kill(process.pid, number)
    process.join()
    assert left.is_dir()
    make_once(out, {"a": 2}, maker("z"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "weights").read_text() == "z"


def test_a_folder_that_no_recipe_made_is_not_touched(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        make_once(folder, {"a": 1}, maker("x"))
    assert maker.calls == 0 and (folder / "thesis.txt").read_text() == "years of work"
    (folder / "recipe.json").write_text("{broken")
    with pytest.raises(ConfigError, match="something else"):
        make_once(folder, {"a": 1}, maker("x"))


def test_an_empty_folder_is_filled(tmp_path):
    assert make_once(tmp_path, {"a": 1}, lambda folder: maker("x")(folder)) and (tmp_path / "weights").exists()


def test_fingerprints_see_names_and_contents_but_not_the_recipe(tmp_path):
    (tmp_path / "a").write_text("1")
    first = fingerprint(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    assert fingerprint(tmp_path) == first
    (tmp_path / "a").write_text("2")
    second = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    assert fingerprint(tmp_path / "b") != first
