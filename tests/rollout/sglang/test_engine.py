"""rollout/sglang/pending.py: the parts that need no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.pending import SGLangPending, check_kept, spread_groups


def test_the_first_of_every_prompt_starts_before_the_second_of_any():
    prompts = [(1, 2), (1, 2), (3,), (3,), (3,), (1, 2), (4,)]
    requests = [Request(str(i), prompt, SamplingParams(1)) for i, prompt in enumerate(prompts)]
    assert spread_groups(requests) == [0, 2, 6, 1, 3, 4, 5]
    assert spread_groups([]) == []


def test_a_token_that_truncation_did_not_keep_is_an_error():
    request = Request("7:a:0", (1, 2), SamplingParams(4, top_p=0.9, top_k=20))
    check_kept([-0.1, -80.0, -1e29], request)
    with pytest.raises(
        EngineError, match=r"7:a:0: response token 1 .*top_k=20 and top_p=0.9 keep a mass of 0.*top_p=1"
    ):
        check_kept([-0.1, -3.4e38, -3.4e38], request)
    for least in (-1.1e30, -float("inf")):
        with pytest.raises(EngineError, match="response token 0 "):
            check_kept([least], request)


def test_what_an_engine_delivers_is_checked_for_tokens_that_it_did_not_keep():
    def delivered(*logprobs: float):
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [(each, 5, None) for each in logprobs]}
        output = {"meta_info": meta, "output_ids": [5] * len(logprobs)}
        deliveries = SimpleNamespace(output=lambda rid: output)
        engine = SimpleNamespace(versions={"target": "actor-1", "draft": "none"})
        pending = SGLangPending(engine, SimpleNamespace(deliveries=deliveries), [])
        pending.requests, pending.ids, pending.order = [Request("7:a:0", (1,), SamplingParams(4, top_k=2))], ["x"], [0]
        return pending.delivered()

    assert delivered(-0.1, -0.2)[0].sampler_logprobs == [-0.1, -0.2]
    with pytest.raises(EngineError, match="7:a:0: response token 1 was drawn although top_k=2"):
        delivered(-0.1, -3.4e38)
