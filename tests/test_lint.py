"""ruff finds the same in this repository with and without a folder runs/ of a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path) -> Path:
    """Copy the folder that has the same name as a run's, and ruff's settings; make a run beside them."""
    shutil.copytree(REPOSITORY / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/config.yaml").write_text("run: {name: quickstart}\n")
    return tmp_path


def check(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_s_folder_does_not_change_what_ruff_says(copy):
    done = check(copy)
    assert done.returncode == 0, done.stdout


def test_it_would_if_folders_decided_what_is_first_party(copy):
    """The test above needs this to prove anything."""
    settings = copy / "pyproject.toml"
    text = settings.read_text()
    assert "\nsrc = []\n" in text
    settings.write_text(text.replace("\nsrc = []\n", "\n"))
    assert "I001" in check(copy).stdout
