"""launch/train.py as users start it: a mistake is answered by one clear error and a non-zero exit, quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import SMALLEST

REPOSITORY = Path(__file__).parent.parent


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "launch/train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SMALLEST)
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actor.optim.learning_rate=1"], "unknown key; did you mean actor.optim.lr?"),
        (["model.path=/does/not/exist"], "no folder /does/not/exist"),
        (["actor.parallel.tp=2"], "--num_gpus 2"),
    ],
)
def test_mistakes_are_named(config, overrides, words):
    result = launch("--config", config, *overrides)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_configuration():
    result = launch("--config", "absent.yaml")
    assert result.returncode == 2 and "no configuration file at absent.yaml" in result.stderr
