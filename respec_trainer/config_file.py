"""Read a configuration: one YAML file, `key=value` overrides, and errors that name the key and the remedy.

config = load_config("configs/quickstart.yaml", ["actor.parallel.tp=1", "run.steps=3"])
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from respec_trainer.config import Config, Section
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms.checks import check_config

Kind = TypeVar("Kind", bound=Section)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads 1e-6 as a number (YAML 1.1 requires 1.0e-6) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"key {twice!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: type[Kind] = Config) -> Kind:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML) and validate the result as a `kind`.

    Raises ConfigError for a missing or malformed file; for bad keys, all of them in one error, each with the nearest
    valid key; and for settings that the speculation algorithm does not support.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}; see configs/ for examples")
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'run:' and 'model:', not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(_explain(item, kind) for item in error.errors())) from error
    if isinstance(config, Config):
        _check_algorithm(path, config)
    return config


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, from which `load_config` reads an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _check_algorithm(path: Path, config: Config) -> None:
    """Raise ConfigError, naming the file, for settings that the chosen speculation algorithm does not support."""
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n  {error}") from error


def _apply_override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    node = tree
    for depth, part in enumerate(parts[:-1], 1):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a value, not a section")
    node[parts[-1]] = value


def _explain(item: dict[str, Any], kind: type[Section]) -> str:
    """Return one line for one pydantic error: the dotted key, the problem, and the nearest valid key if unknown."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"  {key}: unknown key; did you mean {_nearest(key, kind)}?"
    if item["type"] == "missing":
        return f"  {key}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"  {key}: {message}{given}" if key else f"  {message}"


def _nearest(key: str, kind: type[Section]) -> str:
    """The valid dotted key most similar to `key`, by its last name (or the initials of that name) and its parent."""
    keys = valid_keys(kind)
    parent, _, name = key.rpartition(".")
    initials = "".join(word[:1] for word in name.split("_"))

    def similarity(candidate: str) -> float:
        candidate_parent, _, candidate_name = candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name, candidate_name).ratio()
        same_name = 1.0 if initials == candidate_name else same_name
        return same_name + 0.5 * difflib.SequenceMatcher(None, parent, candidate_parent).ratio()

    return max(keys, key=similarity)


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the configuration, including sections."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
    return keys
