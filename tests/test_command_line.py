"""command_line.py: options are read, and errors are printed once, by the first rank."""

from __future__ import annotations

import gc
import logging
import os
import warnings

import pytest

from respec_trainer import command_line
from respec_trainer.command_line import print_error, read_arguments, refuse, settle_process
from respec_trainer.errors import ConfigError


def test_overrides_may_stand_anywhere_among_the_options():
    args = read_arguments("what it does", ["run.steps=2", "--config", "my.yaml", "--local_rank", "1", "run.seed=3"])
    assert (args.config, args.overrides, args.local_rank) == ("my.yaml", ["run.steps=2", "run.seed=3"], 1)
    assert not args.check and args.nodes is args.gpu_memory_gb is None


def test_the_options_of_check_are_read_with_it():
    size = ["--nodes", "2", "--gpus_per_node", "8", "--gpu_memory_gb", "141"]
    args = read_arguments("what it does", ["--check", "--config", "c", *size, "--model_config", "config.json"])
    assert args.check and (args.nodes, args.gpus_per_node, args.gpu_memory_gb) == (2, 8, 141.0)
    assert args.model_config == "config.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config"),
        (["--config", "c", "--nodes", "2"], "--nodes is for --check"),
        (["--config", "c", "--model_config", "m"], "--model_config is for --check"),
        (["--config", "c", "--check", "--gpus_per_node", "0"], "must be positive"),
        (["--config", "c", "--check", "--gpu_memory_gb", "-1"], "must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        read_arguments("what it does", words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_the_user_set_in_the_environment_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    for name in ("TOKENIZERS_PARALLELISM", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that the test restores it
        monkeypatch.delenv(name)
    level = logging.getLogger("sglang").level
    try:
        with warnings.catch_warnings():
            settle_process()
            assert not gc.isenabled()
    finally:
        gc.enable()
        logging.getLogger("sglang").setLevel(level)
    told = {name: os.environ[name] for name in command_line.ENVIRONMENT}
    assert told == {"OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.mark.parametrize(("rank", "waits"), [(0, []), (1, [20.0]), (7, [20.0])])
def test_the_first_rank_tells_an_error_before_the_others(rank, waits, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(command_line.time, "sleep", slept.append)
    assert refuse(ConfigError("run.steps=0: must be positive"), rank) == 2
    assert slept == waits and capsys.readouterr().err == "\nerror: run.steps=0: must be positive\n"


def test_only_an_unexpected_error_is_printed_with_its_traceback(capsys):
    print_error(ConfigError("no folder actor"))
    assert "Traceback" not in capsys.readouterr().err
    try:
        raise KeyError("gone")
    except KeyError as error:
        print_error(error)
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "KeyError: 'gone'" in printed
