"""The audit passes a correct engine, and fails one with a planted fault, for four faults."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.audit.draws import Plan, examine
from respec_trainer.audit.law import laws
from respec_trainer.audit.report import CellResult, Standard, judge
from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.rollout.sample import SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.rollout.sglang.weights import WeightUpdater
from tests.support.processes.forking import planted
from tests.support.rollout_models import VOCAB, Reference, save_drafter, save_target

PROMPTS = [tuple(range(5, 25)), (9, 40, 3)]
STANDARD = Standard(total_variation=0.08)
PARAMS = SamplingParams(6, temperature=0.8, ignore_eos=True)
# Code planted in the engine's scheduler process, where it changes functions of the plugin.
GREEDY = """
import respec_trainer.rollout.sglang.inside.plugin as plugin

plugin.verify_uses_greedy = lambda **_: True
"""
REST_AS_IT_WAS = """
import sgl_kernel.sampling as sampling

draw = sampling.draw_rest
sampling.draw_rest = lambda probs, candidates, rejected, uniform: draw(probs, candidates, rejected & False, uniform)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    target = save_target(tmp_path_factory.mktemp("audit") / "target", "qwen3")
    return target, save_drafter(target.parent / "drafter", target, torch.arange(VOCAB))


@pytest.fixture(scope="module")
def reference(folders):
    return Reference(folders[0])


def start(folders) -> SGLangEngine:
    target, drafter = map(str, folders)
    shape, config = SpeculationConfig(steps=3, topk=1, draft_tokens=4), EngineConfig(max_total_tokens=8192)
    engine = SGLangEngine(EngineSettings(target, drafter, dtype="fp32", speculation=shape, engine=config))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(folders):
    engine = start(folders)
    yield engine
    engine.shutdown()


def audit(engine, reference) -> CellResult:
    def laws_after(prefixes):
        rows = {len(prefix) for prefix in prefixes}
        by_length = {n: [list(p) for p in prefixes if len(p) == n] for n in rows}
        logits = {n: iter(reference.logits(some)[:, -1]) for n, some in by_length.items()}
        return laws(torch.stack([next(logits[len(prefix)]) for prefix in prefixes]), PARAMS)

    return examine(engine, Plan("cell", PROMPTS, PARAMS, laws_after), STANDARD, cells=1, limit=1500)


def passed(result: CellResult) -> bool:
    return judge([result], STANDARD)[0].passed


def refuted(result: CellResult) -> bool:
    """Return if a p-value is below the level: a lack of power would fail the audit as well, but prove nothing."""
    return judge([result], STANDARD)[0].refuted


def test_an_engine_that_is_right_passes(engine, reference):
    result = audit(engine, reference)
    assert passed(result), result
    assert result.accept_length > 1.3, "without accepted drafts there is nothing to test"


@pytest.mark.parametrize("bug", [GREEDY, REST_AS_IT_WAS], ids=["greedy verification", "rest not renormalised"])
def test_broken_verification_fails(folders, reference, engine, bug):
    engine.shutdown()  # a process holds one engine
    with planted(bug):
        broken = start(folders)
    try:
        assert refuted(audit(broken, reference))
    finally:
        broken.shutdown()
        engine.start()


def test_stale_prefixes_after_an_update_fail(monkeypatch, engine, reference, folders):
    """The engine keeps the prompts' KV cache of the old weights; only the law after the update is right."""
    whole = WeightUpdater.send

    def unflushed(updater, *what, **fields):
        return whole(updater, *what, **fields | ({"flush_cache": False} if "flush_cache" in fields else {}))

    state, generator = reference.model.state_dict(), torch.Generator().manual_seed(0)
    old = {name: weight.clone() for name, weight in state.items()}
    new = {name: weight + 0.2 * torch.randn(weight.shape, generator=generator) for name, weight in old.items()}
    try:
        reference.model.load_state_dict(new)
        push(engine, new)
        assert passed(audit(engine, reference))
        reference.model.load_state_dict(old)
        monkeypatch.setattr(WeightUpdater, "send", unflushed)
        push(engine, old)
        assert refuted(audit(engine, reference))
    finally:
        monkeypatch.undo()
        push(engine, old)


def test_drafter_weights_in_the_target_fail(monkeypatch, engine, reference):
    """sglang would load them without an error: the drafter's head has the target's shape."""
    head = reference.model.state_dict()["lm_head.weight"]
    push(engine, {"lm_head.weight": head + 0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))})
    try:
        assert refuted(audit(engine, reference))
    finally:
        push(engine, {"lm_head.weight": head})


def push(engine, weights) -> None:
    engine.begin_weight_update("target")
    engine.receive_tensors(list(weights.items()), "target").result(60)
    engine.end_weight_update("target", "actor-1")
