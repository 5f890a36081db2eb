"""support/imports.py: the checker of the layering finds every kind of import that breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.imports import Sources, cycles, violations

TABLE = {"base": set(), "low": {"base"}, "low.inner": {"base", "low"}, "high": {"base", "low"}}
CLEAN = {
    "__init__.py": "",
    "base.py": "import os\n",
    "low/__init__.py": "",
    "low/thing.py": "from house.base import os\n",
    "low/inner/__init__.py": "",
    "low/inner/part.py": "from house.low.thing import os\n",
    "high/__init__.py": "",
    "high/user.py": "from house.low import thing\nfrom house.high import other\n",
    "high/other.py": "",
}


def house(folder: Path, files: dict[str, str] | None = None) -> Sources:
    """A package `house` of the files of CLEAN, changed by `files`."""
    root = folder / "house"
    for name, text in (CLEAN | (files or {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Sources(root)


def test_what_the_table_allows_passes(tmp_path):
    sources = house(tmp_path)
    assert sources.packages() == {"base", "low", "low.inner", "high"}
    assert violations(sources.imports(), TABLE) == [] and cycles(sources.imports()) == []


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("from house.high.user import thing", 1),
        ("from house.high import user", 1),
        ("import house.high.user", 1),
        ("def lazy():\n    from house.high import user", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high.user import thing", 3),
        ("from ..high import user", 1),
        ("from ..high.user import thing", 1),
        ("from .. import base\nfrom ..high import user", 2),
        ("import importlib\nimportlib.import_module('house.high.user')", 2),
        ("__import__('house.high.user')", 1),
    ],
)
def test_an_import_upward_is_found_however_it_is_written(tmp_path, statement, line):
    sources = house(tmp_path, {"low/broken.py": statement})
    message = f"house/low/broken.py:{line} imports house/high/user.py: low may import only base"
    assert violations(sources.imports(), TABLE) == [message]


def test_a_subfolder_is_a_package_of_its_own(tmp_path):
    sources = house(tmp_path, {"low/thing.py": "from house.low.inner import part"})
    message = "house/low/thing.py:1 imports house/low/inner/part.py: low may import only base"
    assert violations(sources.imports(), TABLE) == [message]


def test_the_init_file_of_a_package_is_checked_too(tmp_path):
    sources = house(tmp_path, {"low/__init__.py": "from house.high import user"})
    message = "house/low/__init__.py:1 imports house/high/user.py: low may import only base"
    assert violations(sources.imports(), TABLE) == [message]


def test_a_package_without_a_line_in_the_table_is_named(tmp_path):
    sources = house(tmp_path, {"new/part.py": "from house import base"})
    assert violations(sources.imports(), TABLE) == [
        "house/new/part.py:1 imports house/base.py: new has no line in the table"
    ]


def test_a_module_that_does_not_exist_is_no_way_around_the_table(tmp_path):
    sources = house(tmp_path, {"low/broken.py": "from house.gone.away import thing"})
    assert violations(sources.imports(), TABLE) == [
        "house/low/broken.py:1 imports house.gone.away: low may import only base"
    ]


def test_a_cycle_is_named_with_the_files_that_close_it(tmp_path):
    lazy = "def later():\n    from house.high import other"
    imports = house(tmp_path, {"base.py": lazy}).imports()
    (message,) = cycles(imports)
    packages, _, files = message.partition(": ")
    path = packages.split(" -> ")
    assert path[0] == path[-1] and {"base", "high"} <= set(path)
    assert "house/base.py:2 imports house/high/other.py" in files
    for importer, imported in zip(path, path[1:], strict=False):
        assert any((one.importer, one.imported) == (importer, imported) and str(one) in files for one in imports)
