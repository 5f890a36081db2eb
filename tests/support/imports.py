"""Find the imports between the files of a package, and compare them with a table of the allowed ones.

A folder counts as a package of its own, by its dotted path below the root package; so does a file of the root. Every
import counts: those inside functions, under TYPE_CHECKING, relative ones, and `import_module` with a literal name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

Table = Mapping[str, Set[str]]  # package -> the packages it may import


@dataclass(frozen=True, order=True)
class Import:
    """One import between two packages. Files are relative to the folder that holds the root package."""

    file: str
    line: int
    target: str  # the imported file, or the module's name where there is no such file
    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


class Sources:
    """The Python files of one package, parsed."""

    def __init__(self, root: Path):
        """`root`: the package's folder, whose name is the package's."""
        self.root = root
        self.files = {self._module(path): path for path in sorted(root.rglob("*.py"))}

    def packages(self) -> set[str]:
        return {self.package(module) for module in self.files} - {""}

    def package(self, module: str) -> str:
        """Return `rollout.sglang` for respec_trainer.rollout.sglang.engine, `job` for respec_trainer.job."""
        path = self.files[module].relative_to(self.root)
        if path.parent == Path():
            return "" if path.stem == "__init__" else path.stem
        return ".".join(path.parent.parts)

    def imports(self) -> list[Import]:
        """Return every import of one package by another, in the order of files and lines."""
        found = (one for module in self.files for one in self._imports_of(module))
        return sorted({one for one in found if one.importer != one.imported})

    def _imports_of(self, module: str) -> Iterator[Import]:
        for node in ast.walk(ast.parse(self.files[module].read_text())):
            for target in self._targets(node, module):
                if target.split(".")[0] != self.root.name:
                    continue
                known = target in self.files
                file = self._shown(self.files[target]) if known else target
                imported = self.package(target) if known else target
                yield Import(self._shown(self.files[module]), node.lineno, file, self.package(module), imported)

    def _targets(self, node: ast.AST, module: str) -> Iterator[str]:
        """Yield the names of the modules that a statement imports."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = self._base(node, module)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in self.files else base
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value

    def _base(self, node: ast.ImportFrom, module: str) -> str:
        """Return the module after `from`; a relative one starts at the folder of the file that imports."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        folder = parts if self.files[module].name == "__init__.py" else parts[:-1]
        start = folder[: len(folder) - (node.level - 1)]
        return ".".join([*start, *([node.module] if node.module else [])])

    def _module(self, path: Path) -> str:
        parts = [self.root.name, *path.relative_to(self.root).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.root.parent))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(imports: list[Import], table: Table) -> list[str]:
    """Return a message for every import that the table does not allow, with both files and the rule."""
    wrong = [one for one in imports if one.imported not in table.get(one.importer, ())]
    return [f"{one}: {_rule(one.importer, table)}" for one in wrong]


def _rule(package: str, table: Table) -> str:
    if package not in table:
        return f"{package or 'the root'} has no line in the table"
    return f"{package} may import only {', '.join(sorted(table[package])) or 'nothing'}"


def cycles(imports: list[Import]) -> list[str]:
    """Return a message for one cycle of packages, with its imports; an empty list if there is no cycle."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        graph.setdefault(one.importer, set()).add(one.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        path = error.args[1][::-1]  # each imports the next
        pairs = set(zip(path, path[1:], strict=False))
        proof = [str(one) for one in imports if (one.importer, one.imported) in pairs]
        return [f"{' -> '.join(path)}: {'; '.join(proof)}"]
    return []
