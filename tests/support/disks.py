"""A disk that is full for some files: writes to them fail with the kernel's own error, ENOSPC."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

FULL = Path("/dev/full")


@contextlib.contextmanager
def full_disk(holds: Callable[[Path], bool] = lambda path: True) -> Iterator[None]:
    """Put files on a full disk, within the block: new ones that pathlib opens, for which `holds` is true."""
    original = Path.open

    def opened(path: Path, mode: str = "r", *args, **kwargs):
        if "x" in mode and holds(path):
            return original(FULL, mode.replace("x", "w"), *args, **kwargs)
        return original(path, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", opened):
        yield
