"""The modules to mutate and the tests that must notice, from modules.toml; and mutants that change nothing."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.mutants import Key

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Module:
    """`mirror`: the tests named like the module. `others`: those of its package, run if the first notice nothing."""

    package: str
    path: str
    mirror: tuple[str, ...]
    others: tuple[str, ...]


def modules(root: Path, packages: list[str]) -> list[Module]:
    """Return the modules of the packages, of all for []. Raises SystemExit for an unknown package."""
    tables = tomllib.loads((HERE / "modules.toml").read_text())
    unknown = [name for name in packages if name not in tables]
    if unknown:
        raise SystemExit(f"no package {unknown[0]!r} in modules.toml; it has {', '.join(tables)}")
    chosen = packages or list(tables)
    return [_module(root, name, tables[name], path) for name in chosen for path in tables[name]["modules"].split()]


def equivalents() -> dict[Key, str]:
    """Return the reasons of the mutants that no test can notice, from equivalent.toml."""
    entries = tomllib.loads((HERE / "equivalent.toml").read_text()).get("mutant", [])
    return {(f"respec_trainer/{e['module']}.py", e["within"], e["was"], e["now"]): e["why"] for e in entries}


def _module(root: Path, package: str, table: dict[str, str], path: str) -> Module:
    folder, _, name = path.replace("/stand_in/", "/").rpartition("/")
    mirror = f"tests/{folder}/test_{name}.py".replace("//", "/")
    own = (root / "tests" / table.get("folder", package)).rglob("test_*.py")
    others = [str(file.relative_to(root)) for file in sorted(own)] + table.get("tests", "").split()
    left = {mirror, *table.get("without", "").split()}
    others = [file for file in dict.fromkeys(others) if file not in left and (root / file).is_file()]
    mirrors = (mirror,) if (root / mirror).is_file() else ()
    return Module(package, f"respec_trainer/{path}.py", mirrors, tuple(others))
