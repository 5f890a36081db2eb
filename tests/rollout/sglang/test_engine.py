"""rollout/sglang/pending.py: the parts that need no engine."""

from __future__ import annotations

from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.pending import spread_groups


def test_the_first_of_every_prompt_starts_before_the_second_of_any():
    prompts = [(1, 2), (1, 2), (3,), (3,), (3,), (1, 2), (4,)]
    requests = [Request(str(i), prompt, SamplingParams(1)) for i, prompt in enumerate(prompts)]
    assert spread_groups(requests) == [0, 2, 6, 1, 3, 4, 5]
    assert spread_groups([]) == []
