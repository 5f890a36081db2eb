"""The canary: one prompt that actor and engine continue greedily; they must say the same.

Digests show that the engine holds what was sent. The canary shows that what was sent means the same there: a mistake in
how tensors are laid out has right digests and a wrong voice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from respec_trainer.config import ResyncConfig
from respec_trainer.errors import ProofError
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

LONGEST_PROMPT = 64  # tokens: the actor reads the prompt once for each new token, without a cache
# Actor and engine multiply in different orders. In float32 that moves log-probs by 1e-4 and less, in bf16, with its 8
# bits, by some hundredths; wrong weights move them by several tenths, unless they are nearly right.
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
        """What the actor says now. Every rank calls it."""
        tokens, logprobs = actor.generate_greedy([self.prompt], self.new_tokens)
        return Continuation(tokens[0], logprobs[0])

    def check(self, engines: Sample, actors: Continuation) -> float:
        """The largest difference of log-probs, in nats; raises ProofError where it exceeds the tolerance.

        Compared up to the first token on which they differ, that one included. There the two laws are still those of
        one prefix, and their largest log-probs differ by no more than the laws do, whichever token has it: so a near
        tie that rounding decides is no difference.
        """
        alike = 0
        while alike < self.new_tokens - 1 and engines.response_ids[alike] == actors.tokens[alike]:
            alike += 1
        pairs = list(zip(engines.sampler_logprobs, actors.logprobs, strict=False))[: alike + 1]
        errors = [abs(theirs - ours) for theirs, ours in pairs]
        wrong = next((place for place, error in enumerate(errors) if not error <= self.tolerance), None)  # or NaN
        if wrong is not None:
            raise ProofError(
                f"the engine does not speak with the actor's voice: greedy token {wrong + 1} of the canary has "
                f"log-prob {pairs[wrong][0]:.4f} in the engine ({engines.actor_version}) and {pairs[wrong][1]:.4f} in "
                f"the actor, further apart than {self.tolerance} (resync.canary_tolerance). Where the digests agree, a "
                "weight is laid out differently on the two sides, or they compute something different"
            )
        return max(errors)


def setup_canary(settings: ResyncConfig, dtype: str, prompts) -> Canary | None:
    """The canary that `resync.verify` asks for, on the first of `prompts`; None where it asks for none."""
    if settings.verify != "full":
        return None
    tolerance = TOLERANCES[dtype] if settings.canary_tolerance is None else settings.canary_tolerance
    return Canary(prompts[0].ids, settings.canary_tokens, tolerance)
