"""speculation/algorithms/: the package is cheap to import, and no other code compares an algorithm's name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import respec_trainer
from respec_trainer.speculation.algorithms import ALGORITHMS

PACKAGE = Path(respec_trainer.__file__).parent
NAMES = {"eagle3", "standalone", "ngram"}  # "none" is a value of other keys too


def comparisons(path: Path) -> Iterator[str]:
    """Yield the lines of a file that compare a value with an algorithm's name, in an expression or a case."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & NAMES
            if found:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} compares with {', '.join(sorted(found))}"


def test_nothing_outside_the_descriptions_compares_with_a_name():
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "speculation/algorithms" not in path.parents]
    assert len(files) > 200
    assert [line for path in files for line in comparisons(path)] == []


def test_a_configuration_loads_without_torch():
    code = "import sys; import respec_trainer.config_file; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_drafter_that_learns_and_is_never_pushed_is_refused():
    with pytest.raises(ValueError, match="eagle3: a drafter that learns must also be pushed"):
        replace(ALGORITHMS["eagle3"], pushes=False)
