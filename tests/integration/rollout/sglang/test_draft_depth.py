"""Draft steps that change while an engine runs: the same tokens, and drafts as good as with fixed steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.sample import Request, SamplingParams, accept_length
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.telemetry.metrics import step_metrics
from respec_trainer.telemetry.timeline import Timeline
from tests.support.depth_choosers import chosen_by
from tests.support.rollout_models import VOCAB, Reference, save_drafter, save_target

CANDIDATES = (0, 1, 3)
DRAFT_IDS = torch.tensor([token for token in range(VOCAB) if token % 7 != 3])
FIXED = DepthSettings("fixed", CANDIDATES, max_batch=4, max_context=256, fixed=3)
SHARED = (5, 6, 7, 8, 9, 10, 11, 12)
# More than there are slots, of unequal lengths, and some that begin alike.
PROMPTS = (SHARED, (*SHARED, 40), (9,), (3, 100, 130, 17, 22, 64), (*SHARED[:5], 77), (20, 21), SHARED, (88, 99, 110))
LENGTHS = (60, 35, 48, 20, 41, 12, 30, 26)
# Speculation is on, then off for longer, then on: with four slots, requests start while others have a backlog.
ON_AND_OFF = (3, 3, *[0] * 9, 3, 3, 3, 0, 1, 0, 0, 3)


def scripted(*script: int, policy: str = "Scripted", **changes) -> DepthSettings:
    return replace(FIXED, **chosen_by(policy, script), **changes)


def save_sensitive_drafter(folder, target):
    """Save a drafter whose drafts depend on all earlier tokens and features, so that a wrong cache changes them."""
    save_drafter(folder, target, DRAFT_IDS)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights["midlayer.self_attn.q_proj.weight"] *= 0.3
    weights["fc.weight"] = 0.05 * torch.randn(weights["fc.weight"].shape, generator=generator)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("steps") / "target", "qwen3")


@pytest.fixture(scope="module")
def greedy(target) -> list[list[int]]:
    """The answers of transformers, by plain decoding."""
    reference = Reference(target)
    return [reference.greedy(prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def engine(target):
    drafter = save_sensitive_drafter(target.parent / "drafter", target)
    settings = EngineSettings(
        str(target),
        str(drafter),
        "fp32",
        speculation=SpeculationConfig(steps=3, topk=1, draft_tokens=4),
        engine=EngineConfig(max_total_tokens=8192, max_running_requests=4),
        steps=FIXED,
    )
    engine = SGLangEngine(settings)
    engine.start()
    yield engine
    engine.shutdown()


def roll_out(engine, steps: DepthSettings, temperature: float = 0.0):
    """Draw all responses with `steps`; return (responses, DecodeLog)."""
    engine.set_steps(steps)
    params = [SamplingParams(length, temperature=temperature, ignore_eos=True) for length in LENGTHS]
    requests = [Request(str(i), prompt, p) for i, (prompt, p) in enumerate(zip(PROMPTS, params, strict=True))]
    samples = engine.submit(requests).collect()
    return [sample.response_ids for sample in samples], engine.take_decode_log()


def decoded(log):
    """Return the decode rows' columns that do not depend on a clock."""
    rows = ~log.prefill
    return [getattr(log, name)[rows].tolist() for name in ("batch", "steps", "tokens", "survivors")]


def test_fixed_steps_are_logged(engine, greedy):
    responses, log = roll_out(engine, FIXED)
    assert responses == greedy
    rows = ~log.prefill
    assert set(log.steps[rows]) == {3} and log.failures == log.dropped == 0
    assert log.tokens[log.prefill].sum() <= sum(map(len, PROMPTS)), "prompts may be found in the cache"
    gained = sum(LENGTHS) - len(LENGTHS)
    assert log.tokens[rows].sum() == gained, "without what the last passes overshot"
    verified = (log.batch + log.survivors.sum(1))[rows]
    assert (log.tokens[rows] <= verified).all() and gained < verified.sum() <= gained + 3 * len(LENGTHS)
    assert 0.1 < log.survivors[rows].sum() / (3 * log.batch[rows].sum()) < 0.9, "drafts are kept, and not all"
    for part in ("draft", "verify", "extend", "decide"):
        assert (getattr(log, part)[rows] > 0).all(), part
    assert (log.extend[log.prefill] > 0).all() and not log.draft[log.prefill].any()
    inside = log.draft + log.verify + log.extend + log.catch_up + log.switch + log.decide
    assert (inside[:-1] <= log.period[:-1]).all()
    assert len(engine.take_decode_log()) == 0, "the log is returned once"


@pytest.mark.parametrize("changes", [{}, {"backlog_mb": 0}, {"catch_up_tokens": 8}], ids=["all", "full", "sliced"])
def test_after_catching_up_drafts_are_those_of_a_drafter_that_read_everything(engine, greedy, changes):
    """The tokens and the kept drafts are the same in every batch."""
    responses, log = roll_out(engine, scripted(*ON_AND_OFF, **changes))
    decodes = ~log.prefill
    # A backlog that is read in slices delays drafting, so the second run uses the steps that the first one took.
    taken = log.steps[decodes].tolist()
    warm_responses, warm = roll_out(engine, scripted(*taken, off="warm"))
    assert responses == warm_responses == greedy
    assert decoded(log) == decoded(warm)
    assert warm.failures == log.failures == 0
    assert log.caught_up.any() and not warm.caught_up.any()
    assert (log.catch_up[log.caught_up > 0] > 0).all()
    off = decodes & (log.steps == 0)
    assert not log.extend[off].any() and warm.extend[off].all()
    wanted = [ON_AND_OFF[i % len(ON_AND_OFF)] for i in range(len(taken))]
    if "catch_up_tokens" in changes:
        assert log.caught_up.max() < 8 + 4, "whole steps of the batch are read"
        assert taken != wanted, "some batch decoded plainly while the drafter was still behind"
    else:
        assert taken == wanted
    assert log.caught_up[off].any() == bool(changes), "the drafter reads nothing while it is not needed"


def test_random_steps_do_not_change_the_tokens(engine, greedy):
    responses, log = roll_out(engine, replace(FIXED, mode="random", seed=3))
    assert responses == greedy
    rows = ~log.prefill
    assert set(log.steps[rows]) == set(CANDIDATES)
    off = rows & (log.steps == 0)
    assert (log.extend[off] > 0).any() and (log.extend[off] == 0).any(), "both values of warm are drawn"
    assert log.switch[rows].any() and log.caught_up.any()


def test_sampled_requests_run_through_changes(engine):
    responses, log = roll_out(engine, replace(FIXED, mode="random", seed=4), temperature=1.0)
    assert [len(response) for response in responses] == list(LENGTHS)
    assert log.survivors.any() and log.failures == 0


def test_a_broken_policy_ends_speculation_and_nothing_else(engine, greedy):
    responses, log = roll_out(engine, scripted(3, policy="Broken"))
    assert responses == greedy
    assert log.failures == 1
    decodes = log.steps[~log.prefill]
    assert decodes[:4].all() and not decodes[4:].any()
    assert not log.caught_up.any()
    assert roll_out(engine, FIXED)[1].failures == 0


def test_an_adaptive_policy_chooses_and_observes(engine, greedy):
    responses, log = roll_out(engine, scripted(1, 0, 3))
    assert responses == greedy and log.failures == 0
    assert log.steps[~log.prefill].tolist() == [(1, 0, 3)[i % 3] for i in range((~log.prefill).sum())]
    assert set(log.predicted[~log.prefill]) == {1.5}


STOPS = tuple(range(0, VOCAB, 9))
STEP, CYCLE = 0.020, {1: 0.012, 3: 0.013}  # made-up seconds, with which drafting pays


def short_responses(engine, state: str = ""):
    """Draw responses that end at a stop token or after 12 tokens; return (samples, DecodeLog) of a learning policy."""
    fixed = {"plain": STEP, "draft": 0.001, "verify": 0.010, "extend": 0.001}
    costs = {piece: (taken, *[0.0] * 5, 1.0) for piece, taken in fixed.items()}
    costs["draft"] = (0.001, 0.0, 0.0005, *[0.0] * 3, 1.0)
    engine.set_steps(replace(FIXED, mode="adaptive", costs=costs, prior=(0.7,) * 3))
    if state:
        engine.restore_depth_chooser(state)
    params = SamplingParams(12, stop_token_ids=STOPS)
    samples = engine.submit([Request(str(i), PROMPTS[i % 8], params) for i in range(500)]).collect()
    return samples, engine.take_decode_log()


def test_all_counts_agree_with_what_short_responses_kept(engine):
    """The log, the speed-up, the accept length, and the tokens that the scheduler expects of its choices."""
    _, before = short_responses(engine)
    samples, log = short_responses(engine, before.state)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    kept = sum(len(sample.response_ids) - 1 for sample in samples)
    rows = ~log.prefill
    verified = (log.batch + log.survivors.sum(1))[rows].sum()
    assert verified > 1.04 * kept, "otherwise there is nothing to tell"
    assert log.tokens[rows].sum() == kept
    assert accept_length(samples) == pytest.approx(kept / sum(sample.verify_count for sample in samples))
    line = Timeline.of(log, lambda batch, context: np.full(len(batch), STEP))
    worth = sum(STEP * tokens / batch for tokens, batch in zip(log.tokens[rows], log.batch[rows], strict=True))
    achieved = step_metrics([line])["spec/achieved_speedup"]
    assert achieved == pytest.approx(worth / line.seconds[rows].sum())
    seconds = np.select([log.steps == steps for steps in CYCLE], list(CYCLE.values()), STEP)
    expected = (log.batch * log.predicted * seconds / STEP)[rows].sum()
    assert expected == pytest.approx(kept, rel=0.01)


def test_a_policy_s_state_is_in_the_log_and_is_restored(engine):
    engine.set_steps(scripted(3, 0, 1, policy="Remembering"))
    engine.restore_depth_chooser('{"turn": 1}')
    pending = engine.submit([Request("k", PROMPTS[0], SamplingParams(20, temperature=0.0, ignore_eos=True))])
    with pytest.raises(EngineError, match="while requests run"):
        engine.restore_depth_chooser('{"turn": 0}')
    pending.collect()
    log = engine.take_decode_log()
    chosen = log.steps[~log.prefill].tolist()
    assert chosen[:4] == [1, 3, 0, 1] and json.loads(log.state) == {"turn": 1 + len(chosen)}
    engine.set_steps(FIXED)
    with pytest.raises(EngineError, match="no depth policy with a state to restore"):
        engine.restore_depth_chooser(log.state)


def test_other_candidates_are_refused(engine):
    with pytest.raises(EngineError, match=r"started with the candidate steps \[0, 1, 3\]"):
        engine.set_steps(replace(FIXED, candidates=(0, 2, 3)))
    with pytest.raises(EngineError, match="simulated only by an engine that started so"):
        engine.set_steps(replace(FIXED, simulated_accept_length=2.0))
    pending = engine.submit([Request("k", PROMPTS[0], SamplingParams(40, temperature=0.0, ignore_eos=True))])
    with pytest.raises(EngineError, match="while requests run"):
        engine.set_steps(FIXED)
    assert len(pending.collect()[0].response_ids) == 40
