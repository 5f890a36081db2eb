"""Rewards that the user writes: a function in a Python file.

    def short(response, answer):            # one sample: number, Score, or None to skip it
        return float(len(response) < 100)

    def ranked(items):                      # a batch of contract.RewardItem: a list of results, one an item
        return [float(not item.truncated) for item in items]

The signature decides: a function whose first parameter is `items`, and that needs no other, takes batches; one that
can be called with two positional arguments takes single samples; any other is refused.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from respec_trainer.config import RewardConfig
from respec_trainer.errors import ConfigError, RewardError
from respec_trainer.rewards.contract import Result, Reward, RewardItem, describe, failure


def setup(config: RewardConfig) -> Reward:
    """Make the reward of `reward.function`, "path/to/file.py:name". Raises ConfigError if it cannot be used."""
    label = f"reward.function={config.function}"
    function = load_function(config.function)
    return function if takes_batch(function, label) else one_by_one(function, label)


def load_function(location: str) -> Callable:
    """Run the file of `location`, "path/to/file.py:name", and return its function `name`.

    Raises ConfigError if there is no such file or function, or the file fails.
    """
    path, colon, name = location.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ConfigError(f"reward.function={location}: no file {path or location!r}; give path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(f"reward_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward.function={location}: {path} fails: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward.function={location}: {path} has no function {name!r}")
    return function


def takes_batch(function: Callable, label: str) -> bool:
    """Return True if the function takes a batch (`items`), False if it takes a response and its reference answer.

    Raises ConfigError for a function that can be called neither way, and for an async one. `label` is the key and its
    value, for errors.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(f"{label} is async: write it with a plain def that returns its results")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label}: its signature cannot be read ({error}); call it from a def of your own") from error
    if next(iter(signature.parameters), None) == "items" and _can_take(signature, 1):
        return True
    if _can_take(signature, 2):
        return False
    name = label.rpartition(":")[2]
    raise ConfigError(
        f"{label} has the signature {signature}; define {name}(response, answer), called for each sample, or "
        f"{name}(items), called with a batch of respec_trainer.rewards.contract.RewardItem"
    )


def _can_take(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def one_by_one(function: Callable[[str, str], Result], label: str) -> Reward:
    """Make the reward that calls `function(response, answer)` for each item. Its RewardError describes the item."""

    def score(item: RewardItem) -> Result:
        try:
            return function(item.response, item.answer)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(label, describe(item), error) from error

    def reward(items: Sequence[RewardItem]) -> list[Result]:
        return [score(item) for item in items]

    return reward
