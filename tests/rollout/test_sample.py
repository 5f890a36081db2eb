"""rollout/sample.py: seeds of requests, defaults that change no distribution, accept lengths."""

from __future__ import annotations

import hashlib

import pytest

from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED, Request, Sample, SamplingParams, with_seed
from respec_trainer.rollout.sample import accept_length as accept_length_of


def request(key: str = "7/3/0") -> Request:
    return Request(key, (1, 2), SamplingParams(max_new_tokens=5, temperature=0.5))


def test_a_seed_is_63_bits_of_a_hash_of_run_and_key():
    """The value is fixed, so that every machine and every later version draws the same."""
    for key in ("7/3/0", "7/3/1", "x" * 99):
        seeded = with_seed(request(key), 12)
        whole = int(hashlib.sha256(f"12:{key}".encode()).hexdigest(), 16)
        assert seeded.sampling.seed == whole >> (256 - 64 + 1) < 2**63
        assert (seeded.key, seeded.prompt_ids) == (key, (1, 2))
        assert (seeded.sampling.max_new_tokens, seeded.sampling.temperature) == (5, 0.5)
    assert with_seed(request(), 12).sampling.seed != with_seed(request(), 1).sampling.seed
    assert request().sampling.seed is None, "the request itself is unchanged"


def test_by_default_the_whole_distribution_is_sampled_until_the_model_ends():
    params = SamplingParams(max_new_tokens=3)
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, -1)
    assert (params.stop, params.stop_token_ids, params.ignore_eos, params.seed) == ((), (), False, None)


def test_origins_have_the_numbers_that_the_engine_sends():
    assert (UNDRAFTED, ACCEPTED, BONUS) == (0, 1, 2)


def drawn(passes: int = 0, histogram=()) -> Sample:
    return Sample("k", [1], [2], [-1.0], "stop", "actor-0", "d", verify_count=passes, accept_histogram=list(histogram))


def test_a_new_sample_has_no_passes_no_restarts_and_no_reward():
    sample = Sample("k", [1], [2], [-1.0], "stop", "actor-0", "drafter-0")
    assert (sample.verify_count, sample.restarts, sample.reward, sample.reward_parts) == (0, 0, None, {})
    assert sample.accept_histogram == sample.origins == []


@pytest.mark.parametrize(
    ("passes", "histogram", "expected"),
    [(0, [], 1.0), (4, [4], 1.0), (4, [1, 2, 1], 1 + (2 * 1 + 1 * 2) / 4), (2, [0, 0, 0, 2], 4.0)],
)
def test_the_accept_length_counts_drafts_by_their_depth_and_the_bonus(passes, histogram, expected):
    assert drawn(passes, histogram).accept_length == pytest.approx(expected)


def test_the_accept_length_of_many_weighs_passes_not_samples():
    samples = [drawn(1, [0, 0, 1]), drawn(9, [9]), drawn()]
    assert accept_length_of(samples) == pytest.approx(1 + 2 / 10)
    assert accept_length_of([]) == 1.0
