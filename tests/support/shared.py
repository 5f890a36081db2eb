"""Folders that all workers of one pytest run use: the first that needs one makes it, the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` of this pytest run, which `make` fills, once for all workers.

    `make` must create the folder only when its content is complete: a folder that is there is taken as it is.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has its own folder in that of the run
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder
