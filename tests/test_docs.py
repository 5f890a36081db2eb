"""The documents name files that exist, their links have targets, and long pages begin with a summary.

The keys in docs/configuration.md are those of the configuration, and the examples in docs/extending.md are code of
tests/support.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from respec_trainer.config_file import valid_keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LONG = 150  # lines; a page with more begins with a summary

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A Python file, or anything below a folder of the repository; a * stands for any part of a name.
FILE = re.compile(r"(?<![\w/.-])((?:[\w*.-]+/)*[\w*-]+\.py\b|(?:configs|docs|launch|tests|tools)/[\w*./-]*[\w*])")
EXAMPLES = {"path/to/file.py"}  # names that stand for a file of the reader
NEW = re.compile(r"`\S+`\s\(new\)")  # a file that the reader is asked to write

FILES = [
    path for top in ("respec_trainer", "launch", "tools", "benchmarks", "tests") for path in ROOT.glob(f"{top}/**/*.py")
]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    lost = [target for target in LINK.findall(page.read_text()) if "://" not in target and not leads(page, target)]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_that_a_page_names_exists(page):
    text = NEW.sub("", page.read_text())
    lost = sorted({name for name in FILE.findall(text) if name not in EXAMPLES and not exists(name)})
    assert not lost


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])  # the README is a summary itself
def test_a_long_page_begins_with_a_summary_of_about_five_lines(page):
    lines = page.read_text().splitlines()
    if len(lines) <= LONG:
        return
    assert lines[0].startswith("# ") and lines[1] == "" and lines[2].startswith("**In short.** ")
    assert 4 <= lines[2:].index("") <= 7


def test_the_configuration_page_has_every_key_and_no_other():
    keys = valid_keys()
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    text = (ROOT / "docs/configuration.md").read_text().partition("## Keys\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    documented = [key for row in rows for key in re.findall(r"[\w.]+", row)]
    assert sorted(documented) == sorted(set(keys) - sections)


def test_examples_of_extensions_are_code_that_tests_run():
    """The statements of each example are in its file; docstrings are not compared."""
    pages = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(pages) == 5
    for page in pages:
        (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        (source,) = re.findall(r"`(tests/support/\w+\.py)`", page)
        lost = set(statements(example)) - set(statements((ROOT / source).read_text()))
        assert not lost, f"{source} does not hold: {lost}"


def statements(source: str) -> Iterator[str]:
    """The statements of a file, without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
    return map(ast.unparse, tree.body)


def test_the_checks_find_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n\nsee [a](gone.md), [b](page.md#one-title), [c](#two) and `resync/gone.py`\n")
    assert [leads(page, target) for target in LINK.findall(page.read_text())] == [False, True, False]
    assert FILE.findall(page.read_text()) == ["resync/gone.py"] and not exists("resync/gone.py")
    assert exists("resync/stream.py") and exists("stream.py") and exists("configs/qwen2.5-*.yaml")
    assert NEW.sub("", "write `objective/mine.py` (new) and") == "write  and"
    assert list(statements('"""Text."""\ndef f():\n    """Other."""\n    g()  # why\n')) == ["def f():\n    g()"]


def leads(page: Path, target: str) -> bool:
    """Return whether the file of a link in `page` exists, and has the link's heading."""
    name, _, anchor = target.partition("#")
    other = (page.parent / name).resolve() if name else page
    return other.exists() and (not anchor or anchor in anchors(other.read_text()))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(name: str) -> bool:
    """Return whether a file exists: below the repository or the package, or, without a folder in its name, anywhere."""
    if any(next(folder.glob(name), None) for folder in (ROOT, ROOT / "respec_trainer")):
        return True
    return "/" not in name and any(path.match(name) for path in FILES)
