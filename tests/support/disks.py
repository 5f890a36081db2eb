"""A disk that is full, for some files: what is written to them fails as the kernel has it fail, with ENOSPC."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

FULL = Path("/dev/full")


@contextlib.contextmanager
def full_disk(holds: Callable[[Path], bool] = lambda path: True) -> Iterator[None]:
    """Within the block, new files that pathlib opens for writing, of which `holds` is true, lie on a full disk."""
    original = Path.open

    def opened(path: Path, mode: str = "r", *args, **kwargs):
        if "x" in mode and holds(path):
            return original(FULL, mode.replace("x", "w"), *args, **kwargs)
        return original(path, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", opened):
        yield
