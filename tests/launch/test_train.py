"""launch/train.py as users start it: a mistake quickly gives one clear error and a non-zero exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.configs import SMALLEST

REPOSITORY = Path(__file__).parents[2]


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


def test_check_lists_every_problem(config):
    result = launch("--config", config, "--check", "--nodes", "2", "--gpus_per_node", "4", "actor.parallel.tp=3")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for words in ("tp=3 does not divide the 8 ranks", "no folder actor", "no file train.jsonl", "3 problems found"):
        assert words in result.stdout


@pytest.mark.parametrize("option", [["--nodes", "2"], ["--model_config", "config.json"]])
def test_what_is_asked_of_check_is_only_for_it(config, option):
    result = launch("--config", config, *option)
    assert result.returncode == 2 and f"{option[0]} is for --check" in result.stderr


def test_ranks_of_mpirun_must_know_where_to_meet(config):
    told = {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    result = launch("--config", config, **told)
    assert result.returncode == 2 and "MASTER_ADDR is not set" in result.stderr
