"""rollout/sample.py: seeds of requests, defaults that change no distribution, tokens a verify pass."""

from __future__ import annotations

import hashlib
import random

import pytest

from respec_trainer.rollout.fleet.ledger import join
from respec_trainer.rollout.sample import (
    ACCEPTED,
    BONUS,
    UNDRAFTED,
    Request,
    Sample,
    SamplingParams,
    accept_length,
    with_seed,
)


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


def test_a_new_sample_has_no_passes_no_restarts_and_no_reward():
    sample = Sample("k", [1], [2], [-1.0], "stop", "actor-0", "drafter-0")
    assert (sample.verify_count, sample.restarts, sample.reward, sample.reward_parts) == (0, 0, None, {})
    assert sample.accept_histogram == sample.origins == []


def response(kept: list[int], tokens: int | None = None, reason: str = "stop", plain: int = 0) -> Sample:
    """A response whose passes kept these drafts, cut to `tokens` tokens, after `plain` passes without drafts."""
    runs = [[UNDRAFTED]] * (1 + plain) + [[ACCEPTED] * drafts + [BONUS] for drafts in kept]
    origins = [origin for run in runs for origin in run][:tokens]
    histogram = [kept.count(depth) + plain * (depth == 0) for depth in range(4)]
    ids = list(range(len(origins)))
    return Sample("k", [1], ids, [0.0] * len(ids), reason, "a", "d", len(kept) + plain, histogram, origins)


def test_every_length_that_a_response_may_end_at():
    """Its passes gave it all but the first token, which comes with the prompt."""
    generator = random.Random(0)
    for _ in range(200):
        kept = [generator.randint(0, 3) for _ in range(generator.randint(1, 6))]
        whole = 1 + sum(kept) + len(kept)
        for cut in range(kept[-1] + 1):
            sample = response(kept, whole - cut)
            assert sample.accept_length == pytest.approx((whole - cut - 1) / len(kept))


def test_passes_without_drafts_keep_one_token_each():
    assert response([3, 1], plain=4).accept_length == pytest.approx((4 + 2 + 4) / 6)
    assert response([], plain=4).accept_length == 1.0


def test_all_samples_together_and_none():
    """7 tokens of two passes and 2 of one; one without passes has none to count."""
    assert accept_length([response([3, 2]), response([3], tokens=3), response([])]) == pytest.approx(9 / 3)
    assert accept_length([response([])]) == accept_length([]) == 1.0


def test_a_response_that_was_continued_has_two_first_tokens():
    """Each life of an engine reads the prompt and draws a token from it, without a verify pass."""
    request = Request("k", (1,), SamplingParams(20))
    first, rest = response([3, 0], reason="lost"), response([2, 3], tokens=1 + 3 + 2)
    whole = join(request, first, rest)
    assert whole.verify_count == 4 and len(whole.response_ids) == 6 + 6
    assert whole.accept_length == pytest.approx((4 + 1 + 3 + 2) / 4)
