"""Mutants of a module: copies of its source with one change each."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from tests.mutation import operators

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Mutant:
    """A module in which the text from byte `start` to `stop` was replaced by `now`."""

    module: str  # its path from the repository's root
    within: str  # the function or class around the change, such as "Ledger.add"; "" for the module
    line: int
    start: int
    stop: int
    was: str
    now: str

    @property
    def key(self) -> Key:
        """The mutant's name, which other changes of the module do not change."""
        return self.module, self.within, " ".join(self.was.split()), " ".join(self.now.split())

    @property
    def described(self) -> str:
        _, within, was, now = self.key
        return f"{self.module}:{self.line} {within}: {was}  ->  {now}"

    def source(self, original: bytes) -> bytes:
        return original[: self.start] + self.now.encode() + original[self.stop :]


def mutants_of(root: Path, module: str) -> list[Mutant]:
    """Return every mutant of the module at path `module` below `root`, in the order of its lines."""
    source = (root / module).read_bytes()
    finder = _Finder(module, source)
    finder.visit(ast.parse(source))
    found = {(m.start, m.stop, m.now): m for m in finder.found if _compiles(m.source(source)) and m.was != m.now}
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.start, mutant.stop))


class _Finder(ast.NodeVisitor):
    """Collects mutants. Left out: messages (f-strings), annotations but for calls in them, and imports."""

    def __init__(self, module: str, source: bytes):
        self.module, self.source, self.found, self.around = module, source, [], []
        lines = source.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]

    def visit(self, node: ast.AST) -> None:
        for text in operators.texts_for(node):
            if not (text == "pass" and isinstance(node, ast.Assign) and self.around[-1:] == ["__init__"]):
                self._add(node, node, text)
        super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        for body in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            self._swaps(body if isinstance(body, list) else [])
        super().generic_visit(node)

    def _swaps(self, body: list[ast.stmt]) -> None:
        for first, second in operators.swapped(body):
            parts = [self._text(second, second), self._text(first, first)]
            self._add(first, second, f"\n{' ' * first.col_offset}".join(parts))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave out: a message; and positions inside f-strings are wrong before Python 3.12."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Leave out."""

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not isinstance(node.body[0], ast.Raise):
            self._add(node.test, node.test, "False")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._add(condition, condition, "True")
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type] if node.type else []
        for kind in kinds:
            self._add(kind, kind, "ZeroDivisionError")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._default(node.value)
        self._calls_in(node.annotation)
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        """Leave out: a name and its annotation."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node, [*node.keywords, *node.body])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            self._default(default)
        self._inside(node, [*node.decorator_list, node.args, *node.body])

    def _inside(self, node: ast.ClassDef | ast.FunctionDef, parts: list[ast.AST]) -> None:
        self.around.append(node.name)
        self._swaps(node.body)
        for part in parts:
            self.visit(part)
        self.around.pop()

    def _calls_in(self, annotation: ast.expr) -> None:
        """Visit the calls in an annotation, such as pydantic's Field(ge=1)."""
        for node in ast.walk(annotation):
            if isinstance(node, ast.Call):
                self.visit(node)

    def _default(self, value: ast.expr | None) -> None:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            self._add(value, value, repr(value.value + "x"))

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _text(self, first: ast.AST, last: ast.AST) -> str:
        start, stop = self._offset(first.lineno, first.col_offset), self._offset(last.end_lineno, last.end_col_offset)
        return self.source[start:stop].decode()

    def _add(self, first: ast.AST, last: ast.AST, now: str) -> None:
        start, stop = self._offset(first.lineno, first.col_offset), self._offset(last.end_lineno, last.end_col_offset)
        place = self.module, ".".join(self.around), first.lineno, start, stop
        self.found.append(Mutant(*place, self._text(first, last), now))


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True
