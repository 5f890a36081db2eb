"""An engine with an EAGLE-3 chain, CUDA graphs for every number of draft steps, and steps that change in a run."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest
import torch

from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.sample import Request, SamplingParams
from tests.gpu.models import prompts, shortfall
from tests.gpu.place import DEVICE, FLOAT32, ON_GPU
from tests.support.depth_choosers import chosen_by
from tests.support.rollout_models import Reference

MOST, CANDIDATES = 32, (0, 1, 3)
FIXED = DepthSettings("fixed", CANDIDATES, max_batch=MOST, max_context=512, fixed=3)
# On, off for longer, on: some requests start while the drafter has not read all of others, and it catches up.
SCRIPT = (3, 3, *[0] * 9, 3, 3, 3, 0, 1, 0, 0, 3)
CHANGING = replace(FIXED, **chosen_by("Scripted", SCRIPT))
# Logits are about 10. If the attention kernel rounds products to TF32's 10 bits, their errors are 0.01.
TIE = 0.05


@pytest.fixture(scope="module")
def reference(small):
    return Reference(small.target)


@pytest.fixture(scope="module")
def engine(small):
    from respec_trainer.config import EngineConfig, SpeculationConfig
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    engine = SGLangEngine(
        EngineSettings(
            str(small.target),
            str(small.drafter),
            dtype="fp32",
            device=DEVICE,
            speculation=SpeculationConfig(steps=3, topk=1, draft_tokens=4),
            engine=EngineConfig(max_total_tokens=32768, max_running_requests=MOST, mem_fraction=0.3),
            steps=FIXED,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FLOAT32.items():
            patch.setenv(name, value)
        engine.start()
    yield engine
    engine.shutdown()


def roll_out(engine, asked, tokens: int, temperature: float = 0.0):
    """Return (samples, DecodeLog) of one response to each prompt."""
    params = SamplingParams(tokens, temperature=temperature, ignore_eos=True)
    samples = engine.submit([Request(str(i), tuple(p), params) for i, p in enumerate(asked)]).collect()
    return samples, engine.take_decode_log()


def worst_choice(reference, samples) -> float:
    """Return how far any token of greedy responses is below the reference's best, at worst, in logits."""
    found = []
    for sample in samples:
        row = sample.prompt_ids + sample.response_ids
        logits = reference.logits([row])[0, len(sample.prompt_ids) - 1 : -1]
        found.append(shortfall(logits, torch.tensor(sample.response_ids)))
    return max(found)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_greedy_tokens_are_transformers_at_every_number_of_steps(engine, reference, record, steps):
    assert engine.process.manager.server_args.disable_cuda_graph != ON_GPU
    engine.set_steps(replace(FIXED, fixed=steps))
    samples, log = roll_out(engine, prompts(48, 512), 40)
    accept = sum(s.accept_length for s in samples) / len(samples)
    record(shortfall=worst_choice(reference, samples), accept_length=accept)
    assert set(log.steps[~log.prefill]) == {steps} and log.failures == 0
    assert worst_choice(reference, samples) <= TIE
    assert accept == 1.0 if steps == 0 else accept > 1.3, "drafts of this drafter are mostly right"


def test_steps_that_change_leave_the_tokens_alone(engine, reference, record):
    """Drafts are accepted after speculation was off, too, so the drafter has read the tokens that it missed."""
    engine.set_steps(CHANGING)
    samples, log = roll_out(engine, prompts(48, 512, seed=1), 60)
    decodes = ~log.prefill
    record(shortfall=worst_choice(reference, samples), steps_seen=sorted(set(log.steps[decodes].tolist())))
    assert worst_choice(reference, samples) <= TIE
    assert set(log.steps[decodes]) == set(CANDIDATES) and log.failures == 0 and log.caught_up.any()
    after = log.caught_up.nonzero()[0]
    kept = log.survivors[after, 0].sum() / log.batch[after].sum()
    record(first_draft_kept_after_catching_up=float(kept))
    assert kept > 0.3, "a drafter that had not read these tokens would be wrong nearly always"


@pytest.mark.point(2)
def test_point_2_sampled_verification_follows_the_targets_distribution(engine, reference, record):
    engine.set_steps(FIXED)
    prompt, draws = (5, 6, 7), 6000
    samples, _ = roll_out(engine, [prompt] * draws, 3, temperature=0.8)
    p = reference.p_value(prompt, [s.response_ids for s in samples], 3, 0.8)
    accepted = sum(s.accept_histogram[1] for s in samples if len(s.accept_histogram) > 1)
    record(p_value=p, draws=draws, accepted_first_drafts=accepted)
    assert accepted > draws / 20, "without accepted drafts there is nothing to test"
    assert p > 1e-3


def test_logprobs_are_the_references(engine, reference, record):
    engine.set_steps(FIXED)
    samples, _ = roll_out(engine, prompts(16, 512, seed=2), 32, temperature=0.7)
    errors = [
        (torch.tensor(s.sampler_logprobs) - reference.logprobs(tuple(s.prompt_ids), s.response_ids, 0.7)).abs().max()
        for s in samples
    ]
    record(largest_error=float(max(errors)))
    assert max(errors) <= 2 * TIE / 0.7, "a log-prob has the errors of two logits, divided by 0.7"


@pytest.mark.point(5)
def test_point_5_what_keeping_the_drafters_cache_costs_while_it_is_off(engine, record):
    """Compare the times of plain steps: the drafter reads each token at once (warm), or all of them later (defer)."""
    seconds, extend = {}, {}
    for off in ("defer", "warm"):
        engine.set_steps(replace(FIXED, fixed=0, off=off, timed=True))
        roll_out(engine, prompts(MOST, 512, seed=3), 20)
        _, log = roll_out(engine, prompts(MOST, 512, seed=4), 100)
        full = ~log.prefill & (log.batch == MOST)
        full[-1] = False  # no batch follows the last one, so it has no period
        seconds[off] = median(log.period[full].tolist())
        extend[off] = median(log.extend[full].tolist())
    record(
        step_ms_deferred=1e3 * seconds["defer"],
        step_ms_warm=1e3 * seconds["warm"],
        drafters_pass_ms=1e3 * extend["warm"],
        cost=seconds["warm"] / seconds["defer"] - 1,
    )
    assert extend["defer"] == 0 < extend["warm"]
