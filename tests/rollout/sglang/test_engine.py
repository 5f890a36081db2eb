"""rollout/sglang/pending.py: the parts that need no engine."""

from __future__ import annotations

import pytest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.pending import check_kept, spread_groups


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
