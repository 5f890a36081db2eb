"""support/shared.py: workers of one run share a folder, which one of them makes."""

from __future__ import annotations

import pytest

from tests.support.shared import made_once


def test_a_folder_is_made_once_and_shared_by_workers(tmp_path_factory, monkeypatch):
    made = []

    def make(folder):
        made.append(folder)
        folder.mkdir()

    root = tmp_path_factory.mktemp("run")
    places = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda worker=worker: root / worker)
        places.append(made_once(tmp_path_factory, "actor", make))
    assert places == [root / "shared/actor"] * 2 and made == places[:1]


def test_a_folder_that_could_not_be_made_is_tried_again(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    root = tmp_path_factory.mktemp("run")
    monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: root)
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path_factory, "actor", lambda folder: 1 / 0)
    assert made_once(tmp_path_factory, "actor", lambda folder: folder.mkdir()).is_dir()
