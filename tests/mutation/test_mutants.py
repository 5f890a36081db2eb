"""mutation/mutants.py: which changes are planted, and where none are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.table import equivalents, modules

ROOT = Path(__file__).parents[2]


def mutants(tmp_path, source: str) -> list[Mutant]:
    (tmp_path / "m.py").write_text(source)
    return mutants_of(tmp_path, "m.py")


def changes(tmp_path, source: str) -> set[tuple[str, str]]:
    """Return (was, now) of all mutants, without the parentheses that keep the order of operations."""
    return {(m.was, m.now.replace("(", "").replace(")", "")) for m in mutants(tmp_path, source)}


@pytest.mark.parametrize(
    ("source", "was", "now"),
    [
        ("a = b < c", "b < c", "b <= c"),
        ("a = b >= c", "b >= c", "b > c"),
        ("a = b == c", "b == c", "b != c"),
        ("a = b is None", "b is None", "b is not None"),
        ("a = b not in c", "b not in c", "b in c"),
        ("a = b and c", "b and c", "b or c"),
        ("a = b and c", "b and c", "b"),
        ("a = b or c", "b or c", "c"),
        ("a = not b", "not b", "b"),
        ("a = b - c", "b - c", "b + c"),
        ("a = b // c", "b // c", "b * c"),
        ("a = -b", "-b", "b"),
        ("a = True", "True", "False"),
        ("a = 3", "3", "4"),
        ("a = 3", "3", "2"),
        ("a = 0.5", "0.5", "1.0"),
        ("a += b", "a += b", "a -= b"),
        ("a += b", "a += b", "pass"),
        ("a = min(b, c)", "min(b, c)", "maxb, c"),
        ("a = b.amax(1)", "b.amax(1)", "b.amin1"),
        ("a = zip_longest(b, c, fillvalue=0)", "zip_longest(b, c, fillvalue=0)", "zipb, c"),
        ("a = zip(b, c, strict=True)", "zip(b, c, strict=True)", "zipb, c"),
        ("a = b.encode(errors='replace')", "b.encode(errors='replace')", "b.encode"),
        ("a = sorted(b, key=c)", "sorted(b, key=c)", "listb"),
        ("a = b.strip()", "b.strip()", "b"),
        ("a = b[1:c]", "1:c", ":c"),
        ("a = b[1:c]", "1:c", "1:"),
        ("a = b if c else d", "b if c else d", "b"),
        ("a = b if c else d", "b if c else d", "d"),
        ("a = [b for b in c if d]", "d", "True"),
        ("if a:\n    b = c", "a", "False"),
        ("a.b = c", "a.b = c", "pass"),
        ("f(a)", "f(a)", "pass"),
        ("f(a)\ng(b)", "f(a)\ng(b)", "gb\nfa"),
        ("raise KeyError(a)", "raise KeyError(a)", "pass"),
        ("raise KeyError(a)", "raise KeyError(a)", "raise RuntimeErrora"),
        ("def f():\n    return a", "return a", "return None"),
        ("for a in b:\n    break", "break", "continue"),
        ("try:\n    f()\nexcept (A, B):\n    pass", "A", "ZeroDivisionError"),
        ("def f(a='x'):\n    pass", "'x'", "'xx'"),
        ("class A:\n    a: Annotated[int, Field(ge=1)]", "1", "2"),
        ("class A:\n    a: str = 'x'", "'x'", "'xx'"),
    ],
)
def test_a_kind_of_mistake_is_planted(tmp_path, source, was, now):
    assert (was, now) in changes(tmp_path, source)


@pytest.mark.parametrize(
    "source",
    [
        '"""A text."""',
        "import a",
        "from a import b",
        "a: int | None",
        "def f(a: int | None) -> b[1]: ...",
        "a = f'{b + 1}'",
        "a = b / 'name'",
        "a = b + 'text'",
        "if TYPE_CHECKING:\n    a = 3",
        "def f():\n    return None",
        "class A:\n    def __init__(self):\n        self.a = b",
    ],
)
def test_nothing_is_planted_in_texts_types_and_imports(tmp_path, source):
    assert changes(tmp_path, source) == set()


SOURCE = '''
class Cart:
    """Hält Preise."""  # two bytes for one character

    def total(self, prices, limit=10):
        if not prices:
            raise ValueError(f"nothing in {self}")
        return min(sum(prices) * 2, limit)
'''


def test_every_mutant_is_the_module_with_one_change(tmp_path):
    found = mutants(tmp_path, SOURCE)
    original = SOURCE.encode()
    assert len({mutant.source(original) for mutant in found}) == len(found) > 8
    for mutant in found:
        assert original[mutant.start : mutant.stop].decode() == mutant.was
        assert ast.dump(ast.parse(mutant.source(original))) != ast.dump(ast.parse(original))
        assert mutant.within == "Cart.total" and mutant.line > 4


def test_a_mutant_keeps_its_name_where_other_lines_change(tmp_path):
    later = {mutant.key for mutant in mutants(tmp_path, "import this\n\n\n" + SOURCE)}
    assert later == {mutant.key for mutant in mutants(tmp_path, SOURCE)}


def test_every_module_exists_and_has_tests():
    for module in modules(ROOT, []):
        assert (ROOT / module.path).is_file(), module.path
        assert module.mirror or module.others, module.path
    with pytest.raises(SystemExit, match="no package 'nowhere' in modules.toml; it has objective"):
        modules(ROOT, ["nowhere"])


def test_every_equivalent_mutant_exists_and_has_a_reason():
    """One that no longer exists would excuse another later."""
    known = equivalents()
    paths = {module for module, *_ in known}
    assert paths <= {module.path for module in modules(ROOT, [])}
    found = {mutant.key for path in paths for mutant in mutants_of(ROOT, path)}
    assert set(known) - found == set()
    assert all(len(why) > 10 for why in known.values())
