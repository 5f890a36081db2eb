"""SGLangEngine: the rollout engine, on sglang 0.5.21."""

from __future__ import annotations

import concurrent.futures
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch

from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Pending, Role, RolloutEngine, TensorSpec
from respec_trainer.rollout.sample import Request, Sample, SamplingParams
from respec_trainer.rollout.sglang_args import EngineSettings
from respec_trainer.rollout.sglang_process import SGLangProcess
from respec_trainer.rollout.sglang_weights import WeightUpdater

__all__ = ["EngineSettings", "SGLangEngine"]

POLL_SECONDS = 1.0
COUNTERS = ("requests", "prompt_tokens", "prompt_tokens_cached", "tokens", "verify_passes", "drafts_accepted")


class SGLangEngine(RolloutEngine):
    """One sglang engine: its scheduler in processes of its own, its request manager in a thread of this one."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.versions: dict[Role, str] = {}
        self._process: SGLangProcess | None = None
        self._updater: WeightUpdater | None = None
        self._pending: list[SGLangPending] = []
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._seeds = torch.Generator().manual_seed(settings.seed)

    def start(self) -> None:
        """Launch the engine's processes and return once it answers; possible again after `shutdown`.

        An engine starts with the weights of the folders: push the current ones before sampling from a later policy.
        """
        if self._process is not None:
            raise EngineError("the rollout engine has been started already")
        self._process = SGLangProcess(self.settings)
        self._updater = WeightUpdater(self._process, self.settings)
        self.versions = {"target": self.settings.actor_version, "draft": self.settings.drafter_version}

    @property
    def process(self) -> SGLangProcess:
        if self._process is None:
            raise EngineError("the rollout engine is not running: call start() first")
        return self._process

    @property
    def weights(self) -> WeightUpdater:
        if self._updater is None:
            raise EngineError("the rollout engine is not running: call start() first")
        return self._updater

    def submit(self, requests: Sequence[Request]) -> SGLangPending:
        """Hand over requests, all in one message, and return at once."""
        if self.weights.role is not None:
            raise EngineError(f"requests during an update of the {self.weights.role} weights: end the update first")
        pending = SGLangPending(self, self.process, list(requests))
        self._pending = [other for other in self._pending if not other.future.done()] + [pending]
        return pending

    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        return self.weights.join_group(name, address, port, world_size, rank_offset, backend)

    def leave_group(self, name: str) -> None:
        self.weights.leave_group(name)

    def begin_weight_update(self, role: Role) -> None:
        if running := sum(not pending.future.done() for pending in self._pending):
            raise EngineError(f"weight update while {running} submitted batches are still running: collect them first")
        self.weights.begin(role)

    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        return self.weights.receive_broadcast(specs, role, group)

    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> None:
        self.weights.receive_tensors(tensors, role)

    def end_weight_update(self, role: Role, version: str) -> None:
        self.weights.end(role)
        self.versions[role] = version

    def sleep(self) -> None:
        self._occupy("release_memory_occupation", "ReleaseMemoryOccupationReqInput", ["kv_cache", "weights"])

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._occupy("resume_memory_occupation", "ResumeMemoryOccupationReqInput", [part])

    def stats(self) -> dict[str, float]:
        """Sums over collected samples, by the names of COUNTERS."""
        return dict(self._counters)

    def shutdown(self) -> None:
        if self._process is not None:
            self._process.shutdown()
            self._process = self._updater = None

    def _occupy(self, method: str, message: str, tags: list[str]) -> None:
        process = self.process
        if self.settings.device == "cpu":
            return  # there is no second memory to make room in
        from sglang.srt.managers import io_struct

        request = getattr(io_struct, message)(tags=tags)
        process.wait(process.call(getattr(process.manager, method), request, None), f"{method} of {' and '.join(tags)}")

    def _sampling(self, params: SamplingParams) -> dict[str, Any]:
        """sglang's sampling parameters of one request, all of them: some defaults come from the model's folder."""
        if params.stop and not self.settings.tokenizer:
            raise EngineError(
                f"stop strings {params.stop} need the tokenizer: start the engine with EngineSettings(tokenizer=True)"
            )
        if params.seed is not None and not self.settings.seeded:
            raise EngineError("a request's seed needs an engine started with EngineSettings(seeded=True)")
        seed = params.seed
        if self.settings.seeded and seed is None:
            seed = int(torch.randint(2**63 - 1, (), generator=self._seeds))
        return {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": 0.0,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": params.ignore_eos,
            "sampling_seed": seed,
        }

    def _count(self, samples: list[Sample]) -> None:
        for sample in samples:
            self._counters["requests"] += 1
            self._counters["prompt_tokens"] += len(sample.prompt_ids)
            self._counters["tokens"] += len(sample.response_ids)
            self._counters["verify_passes"] += sample.verify_count
            self._counters["drafts_accepted"] += sum(d * n for d, n in enumerate(sample.accept_histogram))


class SGLangPending(Pending):
    """Requests on their way. They run from the moment this is made."""

    def __init__(self, engine: SGLangEngine, process: SGLangProcess, requests: list[Request]):
        self.engine, self.process, self.requests = engine, process, requests
        # Updates wait until no request runs, so what is in the engine now draws the whole response.
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
            sampling_params=[engine._sampling(request.sampling) for request in ordered],
            return_logprob=True,
        )
        self.future = process.call(_first, process.manager.generate_request, batch)

    def collect(self) -> list[Sample]:
        if self.samples is None:
            outputs = self._wait()
            by_request = dict(zip(self.order, outputs, strict=True))
            self.samples = [self._sample(request, by_request[i]) for i, request in enumerate(self.requests)]
            self.engine._count(self.samples)
            self.engine._counters["prompt_tokens_cached"] += sum(o["meta_info"]["cached_tokens"] for o in outputs)
        return self.samples

    def done(self) -> int:
        if self.future.done():
            return len(self.requests)
        return sum(rid not in self.process.manager.rid_to_state for rid in self.ids)

    def _wait(self) -> list[dict[str, Any]]:
        """The engine's outputs. The time limit runs from the last sign of life, not from the start."""
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

    def _sample(self, request: Request, output: dict[str, Any]) -> Sample:
        meta = output["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in ("stop", "length"):
            raise EngineError(f"request {request.key}: the rollout engine ended it with {meta['finish_reason']}")
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
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
        )


def spread_groups(requests: Sequence[Request]) -> list[int]:
    """The requests' positions, the first of every prompt before the second of any.

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
