"""The documents name files that exist, their links lead somewhere, and long pages begin with a summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LONG = 150  # lines; a page with more begins with a summary

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A Python file, or anything below a folder of the repository; a * stands for any part of a name.
FILE = re.compile(r"(?<![\w/.-])((?:[\w*.-]+/)*[\w*-]+\.py\b|(?:configs|docs|launch|tests|tools)/[\w*./-]*[\w*])")
EXAMPLES = {"path/to/file.py"}  # of what a reader may write
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


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])  # the README is one by itself
def test_a_long_page_begins_with_a_summary_of_about_five_lines(page):
    lines = page.read_text().splitlines()
    if len(lines) <= LONG:
        return
    assert lines[0].startswith("# ") and lines[1] == "" and lines[2].startswith("**In short.** ")
    assert 4 <= lines[2:].index("") <= 7


def test_the_checks_find_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n\nsee [a](gone.md), [b](page.md#one-title), [c](#two) and `resync/gone.py`\n")
    assert [leads(page, target) for target in LINK.findall(page.read_text())] == [False, True, False]
    assert FILE.findall(page.read_text()) == ["resync/gone.py"] and not exists("resync/gone.py")
    assert exists("resync/stream.py") and exists("stream.py") and exists("configs/qwen2.5-*.yaml")
    assert NEW.sub("", "write `objective/mine.py` (new) and") == "write  and"


def leads(page: Path, target: str) -> bool:
    """Whether a link of `page` has its file, and its heading there."""
    name, _, anchor = target.partition("#")
    other = (page.parent / name).resolve() if name else page
    return other.exists() and (not anchor or anchor in anchors(other.read_text()))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(name: str) -> bool:
    """Whether a file is there: below the repository or the package, or, named without its folder, anywhere."""
    if any(next(folder.glob(name), None) for folder in (ROOT, ROOT / "respec_trainer")):
        return True
    return "/" not in name and any(path.match(name) for path in FILES)
