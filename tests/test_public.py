"""Tests use only public names of packages, because private names may change at any time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
# Private names of other libraries, without an alternative.
FOREIGN = {"os._exit", "shutil._ntuple_diskusage", "HookRegistry._hooks"}
OWN = {"self", "cls"}
PATCHES = {"setattr", "delattr", "object", "getattr"}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("__")


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Return (line, name) of every private name that is imported, or used or patched on another object."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in OWN and not owner.startswith("super()") and f"{owner}.{node.attr}" not in FOREIGN:
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name.name) for name in node.names if is_private(name.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATCHES and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield node.lineno, f"{ast.unparse(node.args[0])}.{name.value}"


def test_no_test_reaches_for_a_private_name():
    found = [
        f"{path.relative_to(TESTS.parent)}:{line}: {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, name in private_names(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_what_counts_as_private():
    reached = ["from a import _b", "x._c()", "patch.setattr(x, '_d', 1)"]
    source = [*reached, "self._e", "os._exit(1)", "x.__f__", "mock.patch.object(x, 'g')"]
    assert sorted(private_names("\n".join(source))) == [(1, "_b"), (2, "x._c"), (3, "x._d")]
