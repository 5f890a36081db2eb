"""Ledger: the requests of one engine in one generation phase, and the tokens that it has drawn for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.sample import Request, Sample


class Ledger:
    """Requests and their samples in order, over as many restarts of the engine as it takes.

    A life of an engine is the time from one start to the next.

    Args:
        resume: whether the tokens that a dead engine delivered are kept. That is exact only if it delivered every
            pass (see `sglang/delivery.py`), and if no stop string can begin in one life and end in the next. Otherwise
            everything is drawn again, finished responses too, because keeping those favors short ones.
    """

    def __init__(self, requests: Sequence[Request], resume: bool):
        self.requests: list[Request] = []
        self.resume = resume
        self.kept: list[Sample | None] = []
        self.extend(requests)
        self.lost_tokens = 0  # delivered, discarded and drawn again
        self.resumed_tokens = 0  # delivered and kept, of responses that were then continued

    def extend(self, requests: Sequence[Request]) -> None:
        """Add requests."""
        self.requests += requests
        self.kept += [None] * len(requests)
        self.resume &= not any(request.sampling.stop for request in requests)

    def open(self) -> list[int]:
        """Return the positions of the requests that have no finished response."""
        return [i for i, kept in enumerate(self.kept) if kept is None or kept.finish_reason == "lost"]

    def remaining(self) -> list[Request]:
        """Return the requests to submit now, with unfinished responses as part of their prompts."""
        return [self._rest(self.requests[i], self.kept[i]) for i in self.open()]

    def add(self, drawn: Sequence[Sample]) -> None:
        """Add the samples that one life drew for `remaining()`; after its death some are "lost"."""
        if self.resume or all(sample.finish_reason != "lost" for sample in drawn):
            for i, sample in zip(self.open(), drawn, strict=True):
                self.kept[i] = join(self.requests[i], self.kept[i], sample)
            self.resumed_tokens += sum(len(self.kept[i].response_ids) for i in self.open() if self.kept[i])
            return
        self.lost_tokens += sum(len(sample.response_ids) for sample in drawn)

    def samples(self) -> list[Sample]:
        """Return all samples. Raises EngineError if a request has no finished response."""
        if self.open():
            raise EngineError(f"{len(self.open())} of {len(self.requests)} requests have no response yet")
        return list(self.kept)

    def _rest(self, request: Request, kept: Sample | None) -> Request:
        if kept is None:
            return request
        left = request.sampling.max_new_tokens - len(kept.response_ids)
        prompt = (*request.prompt_ids, *kept.response_ids)
        return replace(request, prompt_ids=prompt, sampling=replace(request.sampling, max_new_tokens=left))


def join(request: Request, first: Sample | None, then: Sample) -> Sample | None:
    """Join the two parts of a response to `request`, from one life and the next; return None if no token was drawn.

    Raises EngineError if the parts come from different actors: one response must follow one policy.
    """
    if not then.response_ids and then.finish_reason == "lost":
        return first
    if first is None:
        return then
    if first.actor_version != then.actor_version:
        raise EngineError(
            f"request {request.key} was begun by {first.actor_version} and continued by {then.actor_version}: push the "
            f"weights of {first.actor_version} before submitting it again"
        )
    versions = first.drafter_version.split("+")
    histogram = zip_longest(first.accept_histogram, then.accept_histogram, fillvalue=0)
    return replace(
        then,
        prompt_ids=list(request.prompt_ids),
        response_ids=first.response_ids + then.response_ids,
        sampler_logprobs=first.sampler_logprobs + then.sampler_logprobs,
        origins=first.origins + then.origins,
        drafter_version="+".join(dict.fromkeys([*versions, then.drafter_version])),
        verify_count=first.verify_count + then.verify_count,
        accept_histogram=[a + b for a, b in histogram],
        restarts=first.restarts + 1,
    )
