"""Forked engines, which other tests use, generate the same as spawned ones, and end with the rank that started them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from respec_trainer.config import EngineConfig
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.processes.forking import spawned
from tests.support.processes.ranks import run_ranks
from tests.support.rollout_models import save_target

REQUEST = Request("k", (5, 6, 7), SamplingParams(12, temperature=0.0, ignore_eos=True))


def started(target: str) -> SGLangEngine:
    engine = SGLangEngine(EngineSettings(target, dtype="fp32", engine=EngineConfig(max_total_tokens=4096)))
    engine.start()
    return engine


def die_with_an_engine(target: str, report: Path) -> None:
    engine = started(target)
    child, (sample,) = psutil.Process(engine.process.children[0].pid), engine.submit([REQUEST]).collect()
    report.write_text(json.dumps([sample.response_ids, child.pid, child.ppid() == os.getpid()]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_engine_generates_what_a_spawned_one_does_and_ends_with_its_rank(tmp_path):
    target = str(save_target(tmp_path / "target", "qwen3"))
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(1, die_with_an_engine, target, tmp_path / "report")
    response, child, is_own = json.loads((tmp_path / "report").read_text())
    assert not is_own, "the engine is a child of the rank, not of the template"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child):
        assert time.monotonic() < deadline, "the engine outlived its rank"
        time.sleep(0.05)
    with spawned():
        engine = started(target)
    try:
        assert psutil.Process(engine.process.children[0].pid).ppid() == os.getpid()
        assert engine.submit([REQUEST]).collect()[0].response_ids == response
    finally:
        engine.shutdown()
