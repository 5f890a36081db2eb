"""Check how responses end: at the first end token or stop string, or at their limit, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from respec_trainer.rollout.sample import UNDRAFTED, Sample, SamplingParams


@dataclass(frozen=True)
class Ends:
    """Finds faults in the ends of responses. `tokenizer` is needed for stop strings only."""

    end_tokens: frozenset[int]  # the model's own
    tokenizer: Any = None

    def check(self, samples: Sequence[Sample], asked: Sequence[SamplingParams]) -> set[str]:
        """Return the faults of all responses."""
        return {fault for pair in zip(samples, asked, strict=True) if (fault := self.fault(*pair))}

    def fault(self, sample: Sample, params: SamplingParams) -> str | None:
        """Return the fault of a response's end; None if it is right."""
        tokens, limit = sample.response_ids, params.max_new_tokens
        ends = self.end_tokens | set(params.stop_token_ids)
        if len(tokens) > limit:
            return f"longer than its limit of {limit}"
        if ends & set(tokens[:-1]) or self._stopped(tokens[:-1], params):
            return "went on after a stop"
        stopped = (tokens and tokens[-1] in ends) or self._stopped(tokens, params)
        if sample.finish_reason == "stop" and not stopped:
            return "stopped without a reason"
        if sample.finish_reason == "length" and len(tokens) < limit:
            return f"cut off before its limit of {limit}"
        return None

    def _stopped(self, tokens: list[int], params: SamplingParams) -> bool:
        if not params.stop or not tokens:
            return False
        text = self.tokenizer.decode(tokens)
        return any(stop in text for stop in params.stop)


def check_switched(samples: Sequence[Sample]) -> set[str]:
    """Check that speculation was switched at least twice within one response. The first token never has a draft."""
    for sample in samples:
        drafted = [origin != UNDRAFTED for origin in sample.origins[1:]]
        changes = sum(a != b for a, b in pairwise(drafted))
        if changes > 1:
            return set()
    return {"speculation was never switched on and off within a response"}
