"""SGLangPending: requests that an sglang engine is working on."""

from __future__ import annotations

import concurrent.futures
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending
from respec_trainer.rollout.plugin_contract import read_origins
from respec_trainer.rollout.sample import Request, Sample
from respec_trainer.rollout.sglang.process import SGLangProcess

if TYPE_CHECKING:
    from respec_trainer.rollout.sglang.engine import SGLangEngine

POLL_SECONDS = 1.0
IMPOSSIBLE = -1e30  # log-probs below this stand for a probability of 0


class SGLangPending(Pending):
    """Requests submitted to an sglang engine. They start when this is made."""

    def __init__(self, engine: SGLangEngine, process: SGLangProcess, requests: list[Request]):
        self.engine, self.process, self.requests = engine, process, requests
        # No update starts while a request runs, so the current weights draw the whole response.
        self.versions = dict(engine.versions)
        self.ids = [uuid.uuid4().hex for _ in requests]
        self.order = spread_groups(requests)
        self.samples: list[Sample] | None = None
        self.submitted = time.time()
        if not requests:
            self.future: Future = Future()
            self.future.set_result([])
            return
        from sglang.srt.managers.io_struct import GenerateReqInput

        ordered = [requests[index] for index in self.order]
        batch = GenerateReqInput(
            rid=list(self.ids),
            input_ids=[list(request.prompt_ids) for request in ordered],
            sampling_params=[engine.sampling_parameters(request.sampling) for request in ordered],
            return_logprob=True,
        )
        self.future = process.call(_first, process.manager.generate_request, batch)

    def collect(self) -> list[Sample]:
        if self.samples is None:
            self.samples = self._gather(self._wait())
            self.process.deliveries.remove(self.ids)
        return self.samples

    def delivered(self) -> list[Sample]:
        return self._gather([self.process.deliveries.output(rid) for rid in self.ids])

    def done(self) -> int:
        if self.future.done():
            return len(self.requests)
        return sum(rid not in self.process.manager.rid_to_state for rid in self.ids)

    def _wait(self) -> list[dict[str, Any]]:
        """Wait for the engine's outputs. The time limit starts again with every message from the engine."""
        limit = self.engine.settings.engine.timeout
        while True:
            try:
                return self.future.result(POLL_SECONDS)
            except concurrent.futures.TimeoutError:
                silent = time.time() - max(self.submitted, self.process.manager.last_receive_tstamp)
                if silent > limit:
                    self.process.fail(f"the rollout engine has not answered for {limit:.0f} s (rollout.engine.timeout)")
            except EngineError:
                raise
            except Exception as error:
                raise EngineError(f"the rollout engine refused a request: {error}") from error

    def _gather(self, outputs: list[dict[str, Any]]) -> list[Sample]:
        """Return samples in the order of the requests, from outputs in the order of submission."""
        by_request = dict(zip(self.order, outputs, strict=True))
        return [self._sample(request, by_request[i]) for i, request in enumerate(self.requests)]

    def _sample(self, request: Request, output: dict[str, Any]) -> Sample:
        meta = output["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in ("stop", "length", "lost"):
            raise EngineError(f"request {request.key}: the rollout engine ended it with {meta['finish_reason']}")
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        check_kept(logprobs, request)
        if len(logprobs) != len(output["output_ids"]):
            raise EngineError(
                f"request {request.key}: {len(logprobs)} log-probs for {len(output['output_ids'])} tokens"
            )
        return Sample(
            key=request.key,
            prompt_ids=list(request.prompt_ids),
            response_ids=output["output_ids"],
            sampler_logprobs=logprobs,
            finish_reason=reason,
            actor_version=self.versions["target"],
            drafter_version=self.versions["draft"],
            verify_count=meta.get("spec_verify_ct", 0),
            accept_histogram=meta.get("spec_correct_drafts_histogram", []),
            origins=read_origins(meta, len(output["output_ids"]), request.key),
        )


def check_kept(logprobs: Sequence[float], request: Request) -> None:
    """Raise EngineError if the engine drew a token that it says has no probability: what it kept is then unknown."""
    lost = next((i for i, logprob in enumerate(logprobs) if logprob < IMPOSSIBLE), None)
    if lost is not None:
        sampling = request.sampling
        raise EngineError(
            f"request {request.key}: response token {lost} was drawn although top_k={sampling.top_k} and "
            f"top_p={sampling.top_p} keep a mass of 0 for it, so its log-prob is unknown; set "
            "rollout.sampling.top_k=-1 and rollout.sampling.top_p=1"
        )


def spread_groups(requests: Sequence[Request]) -> list[int]:
    """Return the requests' positions, the first request of every prompt before the second of any.

    Requests that start together each compute their prompt; one that starts later finds it in the engine's cache.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    turns = []
    for request in requests:
        turns.append(seen[tuple(request.prompt_ids)])
        seen[tuple(request.prompt_ids)] += 1
    return sorted(range(len(requests)), key=turns.__getitem__)


async def _first(generator_function, batch) -> Any:
    return await generator_function(batch, None).__anext__()
