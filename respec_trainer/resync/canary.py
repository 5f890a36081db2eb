"""The canary: actor and engine continue one prompt greedily, and their log-probs must agree.

Digests show that the engine holds the tensors that were sent. The canary shows that actor and engine compute the same
with them: if a tensor has a wrong layout, the digests are equal, but the log-probs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from respec_trainer.config import ResyncConfig
from respec_trainer.errors import ProofError
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

LONGEST_PROMPT = 64  # tokens; the actor has no cache, and reads the prompt once for each new token
# Actor and engine add in different orders. In float32 this changes log-probs by at most 1e-4, in bf16, with its 8 bits,
# by some hundredths. Wrong weights change them by several tenths, unless they are nearly right.
TOLERANCES = {"fp32": 0.01, "bf16": 0.25}


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation: its tokens and their log-probs at temperature 1."""

    tokens: list[int]
    logprobs: list[float]


class Canary:
    """Compares the log-probs of `new_tokens` greedy tokens after `prompt`."""

    def __init__(self, prompt: Sequence[int], new_tokens: int, tolerance: float):
        self.prompt, self.new_tokens, self.tolerance = tuple(prompt[-LONGEST_PROMPT:]), new_tokens, tolerance

    def request(self) -> Request:
        greedy = SamplingParams(max_new_tokens=self.new_tokens, temperature=0.0, ignore_eos=True)
        return Request("canary", self.prompt, greedy)

    def actor_continuation(self, actor) -> Continuation:
        """Return the actor's continuation with its current weights. Every rank calls it."""
        tokens, logprobs = actor.generate_greedy([self.prompt], self.new_tokens)
        return Continuation(tokens[0], logprobs[0])

    def check(self, engines: Sample, actors: Continuation) -> float:
        """Return the largest difference of log-probs, in nats. Raises ProofError if it exceeds the tolerance.

        The comparison ends at the first token that differs, and includes it. At that token both distributions still
        have the same prefix, and their largest log-probs differ by no more than the distributions do, whichever token
        has them. So a near tie that rounding decides is not an error.
        """
        alike = 0
        while alike < self.new_tokens - 1 and engines.response_ids[alike] == actors.tokens[alike]:
            alike += 1
        pairs = list(zip(engines.sampler_logprobs, actors.logprobs, strict=False))[: alike + 1]
        errors = [abs(theirs - ours) for theirs, ours in pairs]
        wrong = next((index for index, error in enumerate(errors) if not error <= self.tolerance), None)  # or NaN
        if wrong is not None:
            raise ProofError(
                f"the engine's log-probs are not the actor's: greedy token {wrong + 1} of the canary has log-prob "
                f"{pairs[wrong][0]:.4f} in the engine ({engines.actor_version}) and {pairs[wrong][1]:.4f} in the "
                f"actor, which differ by more than {self.tolerance} (resync.canary_tolerance). If the digests agree, a "
                "weight is laid out differently on the two sides, or the two sides compute something different"
            )
        return max(errors)


def setup_canary(settings: ResyncConfig, dtype: str, prompts) -> Canary | None:
    """Return the canary for `resync.verify`, with the first of `prompts`; None unless `verify` is "full"."""
    if settings.verify != "full":
        return None
    tolerance = TOLERANCES[dtype] if settings.canary_tolerance is None else settings.canary_tolerance
    return Canary(prompts[0].ids, settings.canary_tokens, tolerance)
