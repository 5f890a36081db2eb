"""SGLangEngine in bf16 with a tokenizer: stop strings, shutdown and failures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
import torch

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.errors import EngineError
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.models import tiny_tokenizer
from tests.support.processes.forking import spawned
from tests.support.rollout_models import VOCAB, Reference, save_drafter, save_target

PROMPT = (5, 6, 7)
GREEDY = SamplingParams(24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = save_target(tmp_path_factory.mktemp("life") / "target", "qwen3", torch.bfloat16, tied=True)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(target):
    drafter = save_drafter(target.parent / "drafter", target, torch.arange(VOCAB))
    shape = SpeculationConfig(steps=3, topk=1, draft_tokens=4)
    config = EngineConfig(max_total_tokens=4096)
    engine = SGLangEngine(EngineSettings(str(target), str(drafter), tokenizer=True, speculation=shape, engine=config))
    with spawned():
        engine.start()
        yield engine
    engine.shutdown()


def ask(engine, *params):
    return engine.submit([Request(str(i), PROMPT, p) for i, p in enumerate(params)]).collect()


def test_bf16_logprobs_agree_with_transformers(engine, target):
    reference = Reference(target, torch.bfloat16)
    for sample in ask(engine, GREEDY, *[SamplingParams(24, temperature=1.0, ignore_eos=True)] * 4):
        expected = reference.logprobs(PROMPT, sample.response_ids)
        # Logits of size 8 are rounded to 2^-5 in bf16, and the two sum in different orders.
        torch.testing.assert_close(torch.tensor(sample.sampler_logprobs), expected, atol=0.15, rtol=0)
    assert sample.verify_count > 0


def test_stop_strings(engine):
    tokenizer = tiny_tokenizer(VOCAB)
    ask(engine, GREEDY)  # caches the prompt: in bf16 products of other shapes may change tokens
    (whole,) = ask(engine, GREEDY)
    text = tokenizer.decode(whole.response_ids[6:8])
    (stopped,) = ask(engine, SamplingParams(24, temperature=0.0, ignore_eos=True, stop=(text,)))
    assert stopped.finish_reason == "stop" and len(stopped.response_ids) < 24
    assert stopped.response_ids == whole.response_ids[: len(stopped.response_ids)]
    assert tokenizer.decode(stopped.response_ids).endswith(text)


def test_an_idle_engine_uses_little_cpu_time(engine):
    processes = [psutil.Process(child.pid) for child in engine.process.children]
    ask(engine, GREEDY)
    used = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(2)
    assert sum(sum(p.cpu_times()[:2]) for p in processes) - sum(used) < 0.4


def test_a_killed_and_a_stopped_scheduler_are_detected(engine):
    """This must be the last test of the engine, because it ends it twice."""
    children = engine.process.children
    assert len(children) == 2  # scheduler and detokenizer
    pending = engine.submit([Request("k", PROMPT, SamplingParams(200, temperature=1.0, ignore_eos=True))])
    began = time.monotonic()
    os.kill(children[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=f"process {children[0].pid} .*signal 9"):
        pending.collect()
    assert time.monotonic() - began < 5
    with pytest.raises(EngineError, match="signal 9"):
        ask(engine, GREEDY)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineError, match="not running"):
        ask(engine, GREEDY)
    assert not any(child.is_alive() for child in children)

    engine.start()
    assert len(ask(engine, GREEDY)[0].response_ids) == 24
    pids = [child.pid for child in engine.process.children]
    impatient = engine.settings.engine.model_copy(update={"timeout": 1.0})
    engine.settings = replace(engine.settings, engine=impatient)
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(EngineError, match="not answered for 1 s"):
        ask(engine, GREEDY)
    engine.shutdown()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not set(children) & set(multiprocessing.active_children())


def test_a_model_that_is_not_there(tmp_path):
    before = set(multiprocessing.active_children())  # other tests keep ranks running
    engine = SGLangEngine(EngineSettings(str(tmp_path / "nothing")))
    with pytest.raises(EngineError, match="did not start"):
        engine.start()
    engine.shutdown()
    assert set(multiprocessing.active_children()) <= before
