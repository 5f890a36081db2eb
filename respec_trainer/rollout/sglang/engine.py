"""SGLangEngine: a RolloutEngine that runs sglang 0.5.21."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

import torch

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import STEPS_MESSAGE, DecodeLog, DepthSettings, RequestsRunningError
from respec_trainer.rollout.engine import Role, RolloutEngine, TensorSpec
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.pending import SGLangPending
from respec_trainer.rollout.sglang.process import SGLangProcess
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.rollout.sglang.weights import WeightUpdater

# Time limit for an engine to become idle: it may still clean up a batch after its last answer.
CLEARING_SECONDS = 10.0


class SGLangEngine(RolloutEngine):
    """An sglang engine: its schedulers run in processes of their own, its request manager in a thread of this one."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.versions: dict[Role, str] = {}
        self._process: SGLangProcess | None = None
        self._updater: WeightUpdater | None = None
        self._pending: list[SGLangPending] = []
        self._seeds = torch.Generator().manual_seed(settings.seed)
        self._lives = 0
        self._asleep: set[str] = set()
        self._doubt: str | None = None

    def start(self) -> None:
        """Launch the engine's processes and return once it answers. It can start again after `shutdown`.

        An engine starts with the weights of the folders: push the current weights before sampling from a later policy.
        Each start has a seed of its own. With the same seed, the second part of a response that was interrupted would
        be drawn with the random numbers of the first part, and the two would not be independent.
        """
        if self._process is not None:
            raise EngineError("the rollout engine has been started already")
        settings = self.settings.of_start(self._lives)
        self._lives += 1
        self._pending, self._asleep, self._doubt = [], set(), None
        self._process = SGLangProcess(settings)
        self._updater = WeightUpdater(self._process, self.settings)
        self.versions = {"target": self.settings.actor_version, "draft": self.settings.drafter_version}
        self.take_decode_log()  # raises now if the engine cannot change its draft steps

    @property
    def failure(self) -> EngineError | None:
        return EngineError("the rollout engine is not running") if self._process is None else self._process.failure

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
        """Submit requests, all in one message, and return at once."""
        if self.weights.role is not None:
            raise EngineError(f"requests during an update of the {self.weights.role} weights: end the update first")
        if self._doubt is not None:
            raise EngineError(f"no requests while the weights are in doubt: {self._doubt}; push both models completely")
        pending = SGLangPending(self, self.process, list(requests))
        self._pending = [other for other in self._pending if not other.future.done()] + [pending]
        return pending

    def sampling_parameters(self, params: SamplingParams) -> dict[str, Any]:
        """Return sglang's sampling parameters, all of them, because some defaults come from the model's folder."""
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

    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        return self.weights.join_group(name, address, port, world_size, rank_offset, backend)

    def leave_group(self, name: str) -> None:
        self.weights.leave_group(name)

    def weight_shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        return self.weights.shapes(role)

    def begin_weight_update(self, role: Role, names: Collection[str] = ()) -> None:
        if running := sum(not pending.future.done() for pending in self._pending):
            raise EngineError(f"weight update while {running} submitted batches are still running: collect them first")
        self.weights.begin(role, names)

    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        return self.weights.receive_broadcast(specs, role, group)

    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> Future:
        return self.weights.receive_tensors(tensors, role)

    def end_weight_update(self, role: Role, version: str) -> None:
        self.weights.end(role)
        self.versions[role] = version

    def abort_weight_update(self) -> None:
        self.weights.abort()

    def distrust(self, reason: str) -> None:
        self._doubt = reason

    def trust(self) -> None:
        self._doubt = None

    def digests(self, role: Role) -> dict[str, str]:
        return self.weights.digests(role)

    def sleep(self) -> None:
        parts = [part for part in ("kv_cache", "weights") if part not in self._asleep]
        self._occupy("release_memory_occupation", "ReleaseMemoryOccupationReqInput", parts)
        self._asleep |= set(parts)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        parts = [part] if part in self._asleep else []
        self._occupy("resume_memory_occupation", "ResumeMemoryOccupationReqInput", parts)
        self._asleep -= set(parts)

    def take_decode_log(self) -> DecodeLog:
        return DecodeLog() if self.settings.steps is None else self._steps_message()

    def restore_depth_chooser(self, state: str) -> None:
        if self.settings.steps is not None:
            self._steps_message(state=state)

    def set_steps(self, steps: DepthSettings) -> None:
        """Change the depth settings while no request runs; the candidates must be those at the engine's start.

        The depth chooser starts again without its estimates of acceptance, and the log so far is discarded.
        Raises EngineError if the engine cannot change to them.
        """
        started = self.process.settings.steps
        if started is None:
            raise EngineError("draft steps are fixed: start the engine with EngineSettings(steps=...)")
        if steps.simulated_accept_length is not None and started.simulated_accept_length is None:
            raise EngineError(
                "acceptance is simulated only by an engine that started so: start it with DepthSettings("
                "simulated_accept_length=...)"
            )
        self._steps_message(settings=steps.to_json())
        self.settings = replace(self.settings, steps=steps)

    def shutdown(self) -> None:
        if self._process is not None:
            self._process.shutdown()
            self._process = self._updater = None

    def _steps_message(self, **body: str) -> DecodeLog:
        """Take the log from `DraftDepth` in the engine; with `settings` or `state`, change or restore its chooser."""
        from sglang.srt.managers.io_struct import DumperControlReqInput

        if body and any(not pending.future.done() for pending in self._pending):
            raise RequestsRunningError
        process, deadline = self.process, time.monotonic() + CLEARING_SECONDS
        request = DumperControlReqInput(method=STEPS_MESSAGE, body=body)
        while True:
            asked = process.call(process.manager.dumper_control, request)
            (answer,) = process.wait(asked, "asking for the log of draft steps")
            if answer.success:
                return DecodeLog.of_bytes(answer.response[0]["log"])
            if not answer.response[0]["busy"] or time.monotonic() > deadline:
                raise EngineError(f"asking for the log of draft steps: {answer.error}")
            time.sleep(0.01)

    def _occupy(self, method: str, message: str, tags: list[str]) -> None:
        process = self.process
        if self.settings.device == "cpu" or not tags:
            return  # on a CPU there is no GPU memory to release
        from sglang.srt.managers import io_struct

        request = getattr(io_struct, message)(tags=tags)
        process.wait(process.call(getattr(process.manager, method), request, None), f"{method} of {' and '.join(tags)}")
