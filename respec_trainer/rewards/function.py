"""Rewards of the user's own: a function of a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from respec_trainer.errors import ConfigError


def load_function(place: str) -> Callable[[str, str], float]:
    """The function that `place`, "path/to/file.py:name", names. The file is run once, on every rank.

    Raises ConfigError where there is no such file or function, or the file fails.
    """
    path, colon, name = place.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ConfigError(f"reward.function={place}: no file {path or place!r}; give path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(f"reward_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"reward.function={place}: {path} fails: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward.function={place}: {path} has no function {name!r}")
    return function
