"""resync/canary.py: which continuations of the engine are accepted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from respec_trainer.config import ResyncConfig
from respec_trainer.errors import ProofError
from respec_trainer.resync.canary import LONGEST_PROMPT, Canary, Continuation, setup_canary
from respec_trainer.rollout.sample import Sample

ACTOR = Continuation([4, 5, 6], [-0.5, -0.25, -0.75])


def sung(tokens, logprobs):
    return Sample("canary", [1], tokens, logprobs, "length", "actor-3", "drafter-1")


def test_rounding_passes_and_is_measured():
    canary = Canary([1], 3, tolerance=0.01)
    assert canary.check(sung([4, 5, 6], [-0.5, -0.252, -0.75]), ACTOR) == pytest.approx(0.002)


def test_a_near_tie_is_no_difference_and_ends_the_comparison():
    canary = Canary([1], 3, tolerance=0.01)
    assert canary.check(sung([4, 9, 1], [-0.5, -0.251, -8.0]), ACTOR) == pytest.approx(0.001)
    assert canary.check(sung([9, 5, 6], [-0.501, -8.0, -8.0]), ACTOR) == pytest.approx(0.001)
    assert canary.check(sung([4, 5, 9], [-0.5, -0.25, -0.752]), ACTOR) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "place"),
    [
        ([4, 5, 6], [-0.5, -0.3, -0.75], 2),
        ([4, 9, 6], [-0.5, -0.1, -0.75], 2),  # another token, without a near tie
        ([9, 9, 9], [-1.5, -0.25, -0.75], 1),
        ([4, 5, 6], [-0.5, -0.25, float("nan")], 3),
    ],
)
def test_other_log_probs_are_refused(tokens, logprobs, place):
    with pytest.raises(ProofError, match=f"token {place} of the canary.*in the engine .actor-3. and"):
        Canary([1], 3, tolerance=0.01).check(sung(tokens, logprobs), ACTOR)


def test_the_actor_is_asked_for_as_many_tokens():
    asked = []
    actor = SimpleNamespace(generate_greedy=lambda *a: asked.append(a) or ([[4, 5]], [[-0.5, -0.25]]))
    canary = Canary(range(100), 2, 0.01)
    assert canary.actor_continuation(actor) == Continuation([4, 5], [-0.5, -0.25])
    assert asked == [([tuple(range(100 - LONGEST_PROMPT, 100))], 2)]
    request = canary.request()
    assert request.prompt_ids == tuple(range(100 - LONGEST_PROMPT, 100)) and request.sampling.max_new_tokens == 2
    assert request.sampling.temperature == 0 and request.sampling.ignore_eos


def test_the_configuration_decides():
    prompts = [SimpleNamespace(ids=(1, 2))]
    assert setup_canary(ResyncConfig(verify="checksum"), "bf16", prompts) is None
    full = setup_canary(ResyncConfig(verify="full", canary_tokens=3), "bf16", prompts)
    assert (full.prompt, full.new_tokens, full.tolerance) == ((1, 2), 3, 0.25)
    assert setup_canary(ResyncConfig(canary_tolerance=0.5), "fp32", prompts).tolerance == 0.5
    # In float32 the order of additions changes log-probs by at most 1e-4, a wrong weight by tenths.
    assert setup_canary(ResyncConfig(), "fp32", prompts).tolerance == 0.01
