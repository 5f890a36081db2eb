"""benchmarks/scale/estimate.py: a fit agrees with the plan, and the simulated engine is the slowest of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scale.estimate import best_fit, estimate, fits, slowest
from benchmarks.scale.hardware import H100
from benchmarks.scale.run import MODELS, make_trace, settings, shape_of, tables
from respec_trainer.speculation.simulation.replay import policy_named
from respec_trainer.speculation.simulation.simulator import Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace
from tests.support.speculation import GPU

CANDIDATES = [0, 1, 3]


@pytest.fixture(scope="module")
def config():
    return settings(engine_tp=1, prompts=16, longest=512)


def trace_of(responses: int = 96) -> Trace:
    lengths = np.random.default_rng(3).integers(5, 80, responses)
    ones = np.ones(responses, dtype=int)
    return Trace(8 * ones, lengths, np.arange(responses) // 4, np.full((responses, 3), 0.7))


def test_the_fit_is_among_those_that_the_plan_lets_through(config):
    found = list(fits(config, shape_of("3b"), 8, H100))
    assert found and not any(fit.memory.problems() for fit in found)
    best = best_fit(config, shape_of("3b"), make_trace(16, 512), 8, H100)
    assert best in found and best.layout.dp * best.layout.tp == 8
    assert best_fit(config, shape_of("3b"), make_trace(16, 512), 8, replace(H100, memory=8 << 30)) is None


def test_the_slowest_engine_is_nearly_the_one_replayed():
    """Compare with one simulation of all engines."""
    trace, engines = trace_of(), 6
    for policy in ("off", "adaptive"):
        alone = slowest(trace, engines, 8, GPU, CANDIDATES, policy)
        setting = Setting(engines=engines, slots=8, sampled=False)
        every = simulate(trace, GPU, policy_named(policy, GPU, CANDIDATES, trace, setting), setting)
        # Another engine with nearly as many tokens may finish last because of the order of its responses.
        assert alone.makespan == pytest.approx(every.makespan, rel=0.05)


def test_a_step_adds_up_and_shrinks_with_more_gpus(config):
    hf_config, trace = shape_of("3b"), make_trace(16, 512)
    steps = {}
    for gpus in (8, 16):
        fit = best_fit(config, hf_config, trace, gpus, H100)
        step = estimate(fit, hf_config, trace, gpus, H100, CANDIDATES, mfu=0.7)
        parts = step.rollouts["off"].makespan + step.push.seconds(H100) + step.training_seconds(H100)
        assert step.seconds("off", H100) == parts
        assert step.rollouts["off"].off_fraction == 1.0 > step.rollouts["adaptive"].off_fraction
        steps[gpus] = step
    assert steps[16].computing == pytest.approx(steps[8].computing / 2)
    assert steps[16].rollouts["off"].makespan < steps[8].rollouts["off"].makespan


def test_the_tables_name_what_does_not_fit():
    text = tables([{"model": "72b", "gpus": 16, "fits": False}])
    assert text.endswith("No layout fits: 72b on 16.") and text.count("| model | GPUs |") == 3


def test_shapes_have_their_published_sizes():
    """The expected numbers of parameters come from the models' cards, in billions."""
    from respec_trainer.plan.sizes import model_parameters

    stated = {"3b": 3.09, "7b": 7.61, "14b": 14.7, "32b": 32.5, "72b": 72.7}
    for model in MODELS:
        assert model_parameters(shape_of(model)) / 1e9 == pytest.approx(stated[model], rel=0.01)
