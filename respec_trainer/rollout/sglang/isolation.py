"""Protection of the trainer's process while it starts an engine: the environment and global state are restored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def environment_of(changes: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables for processes started within, and restore all variables afterwards."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def side_effects_undone() -> Iterator[None]:
    """Restore what starting an engine changes: logging, multiprocessing's start method, the event loop policy.

    `__main__` is hidden meanwhile, because spawned processes would run the trainer's script, with its imports, again.
    """
    root, main = logging.getLogger(), sys.modules["__main__"]
    level, handlers = root.level, list(root.handlers)
    method, policy = multiprocessing.get_start_method(allow_none=True), asyncio.get_event_loop_policy()
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        asyncio.set_event_loop_policy(policy)
        multiprocessing.set_start_method(method, force=True)
        root.handlers[:] = handlers
        root.setLevel(level)
