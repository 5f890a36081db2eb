"""rollout/fleet/ledger.py: every request is answered once, although engines die."""

from __future__ import annotations

from dataclasses import replace

import pytest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.fleet.ledger import Ledger
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=10)
REQUESTS = [Request(key, (1, 2), SAMPLING) for key in "abc"]


def drawn(key, tokens, reason="stop", version="actor-1", drafter="d0", prompt=(1, 2), histogram=(0, 1)):
    logprobs, origins = [-float(t) for t in tokens], [t % 3 for t in tokens]
    return Sample(key, list(prompt), list(tokens), logprobs, reason, version, drafter, 1, list(histogram), origins)


def test_unfinished_responses_continue_after_their_tokens():
    ledger = Ledger(REQUESTS, resume=True)
    assert ledger.remaining() == REQUESTS
    ledger.add([drawn("a", [5, 6]), drawn("b", [7, 8, 9], "lost"), drawn("c", [], "lost")])
    rest, fresh = ledger.remaining()
    assert (rest.key, rest.prompt_ids, rest.sampling.max_new_tokens) == ("b", (1, 2, 7, 8, 9), 7)
    assert fresh == REQUESTS[2]
    ledger.add([drawn("b", [3], "lost", prompt=rest.prompt_ids), drawn("c", [4], "lost", drafter="d1")])
    rest, last = ledger.remaining()
    assert (rest.prompt_ids, last.prompt_ids) == ((1, 2, 7, 8, 9, 3), (1, 2, 4))
    ledger.add([drawn("b", [2], "length", "actor-1", "d1", rest.prompt_ids), drawn("c", [6], drafter="d1")])
    a, b, c = ledger.samples()
    assert (a.response_ids, a.restarts) == ([5, 6], 0)
    assert (b.prompt_ids, b.response_ids, b.finish_reason) == ([1, 2], [7, 8, 9, 3, 2], "length")
    assert b.sampler_logprobs == [-7, -8, -9, -3, -2] and b.origins == [1, 2, 0, 0, 2]
    assert (b.restarts, b.verify_count, b.accept_histogram, b.drafter_version) == (2, 3, [0, 3], "d0+d1")
    assert (c.response_ids, c.restarts, c.drafter_version) == ([4, 6], 1, "d1")
    assert ledger.lost_tokens == 0
    assert ledger.resumed_tokens == 3 + (4 + 1)


@pytest.mark.parametrize("stop", [(), ("\n",)])
def test_without_resuming_all_is_drawn_again(stop):
    """Finished responses too. A stop string prevents resuming, as it could begin before a restart and end after it."""
    requests = [replace(r, sampling=replace(SAMPLING, stop=stop)) for r in REQUESTS]
    ledger = Ledger(requests, resume=bool(stop))
    ledger.add([drawn("a", [5, 6]), drawn("b", [7], "lost"), drawn("c", [], "lost")])
    assert ledger.remaining() == requests
    assert (ledger.lost_tokens, ledger.resumed_tokens) == (3, 0)
    with pytest.raises(EngineError, match="3 of 3 requests"):
        ledger.samples()
    ledger.add([drawn(key, [1]) for key in "abc"])
    assert [(s.key, s.response_ids, s.restarts) for s in ledger.samples()] == [(k, [1], 0) for k in "abc"]


def test_two_actors_in_one_response_are_refused():
    ledger = Ledger(REQUESTS[:1], resume=True)
    ledger.add([drawn("a", [5], "lost")])
    with pytest.raises(EngineError, match="begun by actor-1 and continued by actor-2"):
        ledger.add([drawn("a", [6], version="actor-2")])


@pytest.mark.parametrize(
    ("first", "then", "both"),
    [((0, 2, 1), (4,), [4, 2, 1]), ((3,), (0, 1, 0, 5), [3, 1, 0, 5]), ((), (2,), [2]), ((1, 1), (), [1, 1])],
)
def test_histograms_of_different_depths_add_up(first, then, both):
    ledger = Ledger(REQUESTS[:1], resume=True)
    ledger.add([drawn("a", [5], "lost", histogram=first)])
    ledger.add([drawn("a", [6], histogram=then)])
    assert ledger.samples()[0].accept_histogram == both
