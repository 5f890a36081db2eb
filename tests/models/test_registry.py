"""models/: no other package names a family, and the engine's processes can import it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import respec_trainer
from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import FAMILIES, family_named

PACKAGE = Path(respec_trainer.__file__).parent
# models/ names the families; a recipe may make a model of one.
MAY_NAME_FAMILIES = ("models", "recipes")
NAMED = re.compile(rf"\b({'|'.join(FAMILIES)})\b(?!\.\d)", re.IGNORECASE)  # Qwen2.5-3B in a help text is a model


def family_names(source: str) -> Iterator[int]:
    """Lines with a string that names a family; docstrings do not count."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        named = isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.search(node.value)
        if named and id(node) not in prose:
            yield node.lineno


def test_no_other_package_names_a_family():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in MAY_NAME_FAMILIES
        for line in family_names(path.read_text())
    ]
    assert not found, f"ask the model's family (models/registry.py) instead of naming it: {', '.join(found)}"


@pytest.mark.parametrize(
    "source",
    ["x = a == 'qwen2'", "x = a in ('llama',)", "x = {'qwen3': 1}[a]", "x = f'sglang.srt.models.llama.{a}'"],
)
def test_a_family_named_elsewhere_is_found(source):
    assert list(family_names(f'"""Qwen2 in prose."""\n{source}')) == [2]


def test_an_unknown_family_is_refused_with_key_nearest_name_and_all_names():
    message = "drafter.path: model_type 'llamma' .* use one of qwen2, qwen3, llama .did you mean 'llama'"
    with pytest.raises(ConfigError, match=message):
        family_named("llamma", "drafter.path")
    with pytest.raises(ConfigError, match="model.path: model_type None is not supported"):
        family_named(None)


def test_families_need_no_heavy_package():
    heavy = "{'torch', 'transformers', 'sglang', 'megatron'}"
    code = f"import sys, respec_trainer.models.registry; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
