"""DraftDepth: draft steps that change while sglang runs, and the log of its batches.

sglang switches a worker between prepared states, one for each number of steps, and asks an object which one to use
before each decode batch. That object is DraftDepth, which asks a DepthChooser. Its hooks also keep the tokens that the
drafter does not read while speculation is off, let it catch up, and measure times. With overlapped scheduling a batch's
results arrive after the next batch has started; DecodeRecorder assigns them to their batch.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import STEPS_MESSAGE, DepthSettings, RequestsRunningError
from respec_trainer.rollout.ends import Ends
from respec_trainer.rollout.sglang.inside.catch_up import Backlog, catch_up, missed
from respec_trainer.rollout.sglang.inside.decode_recorder import DecodeRecorder, survivors_of
from respec_trainer.rollout.sglang.inside.depth_choice import Choice, DepthChooser
from respec_trainer.rollout.sglang.inside.kept_tokens import KeptTokens
from respec_trainer.rollout.sglang.inside.simulated_acceptance import SimulatedAcceptance

PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"


class DraftDepth:
    """Draft steps of the one EAGLEWorkerV2 of a scheduler process; also `params` of sglang's AdaptiveController."""

    def __init__(self, settings: DepthSettings, device: str):
        self.device = device
        self.worker: Any = None
        self.candidate_steps = sorted({0, *settings.candidates})
        self._graph_sizes: list[int] | None = None  # None: the engine has no CUDA graphs
        self._started = False  # whether sglang has told the graphs' sizes
        self._has_states: bool | None = None
        self._verified: list[int] | None = None
        self.apply(settings)

    def apply(self, settings: DepthSettings) -> None:
        """Replace the settings, and start with a new chooser, backlog and log; no request may be running."""
        if sorted({0, *settings.candidates}) != self.candidate_steps:
            raise EngineError(
                f"the engine started with the candidate steps {self.candidate_steps}, and cannot change to "
                f"{list(settings.candidates)}: start it with these"
            )
        self.settings, self.chooser = settings, DepthChooser(settings)
        if self._started:
            self.chooser.set_graph_sizes(self._graph_sizes or ())
        self.backlog = Backlog(settings.backlog_mb * 2**20)
        self.choice = Choice(0, warm=False)
        self.recorder = self._make_recorder()
        self.acceptance = SimulatedAcceptance(settings)

    def _make_recorder(self) -> DecodeRecorder:
        if not self.settings.timed:
            return DecodeRecorder()
        if self.device == "cuda":
            return DecodeRecorder(wait=torch.cuda.synchronize)
        # Only the computing thread's time: other work on the cores must not be in the profile.
        return DecodeRecorder(clock=time.thread_time)

    def hooks(self) -> dict[str, tuple[Callable, str]]:
        """Return hooks for `plugin.py`: target -> (function, kind of hook)."""
        speculative = "sglang.srt.speculative"
        worker, drafter = (f"{speculative}.eagle_worker_v2.{name}" for name in ("EAGLEWorkerV2", "EagleDraftWorker"))
        parts = {
            f"{drafter}.draft": "draft",
            f"{worker}.verify": "verify",
            f"{drafter}._draft_extend_for_decode": "extend",
            f"{drafter}._draft_extend_for_prefill": "extend",
            f"{worker}.apply_runtime_state": "switch",
        }
        return {
            f"{worker}.__init__": (self.install, "AFTER"),
            f"{PROCESSOR}.process_batch_result_decode": (self.settle, "AROUND"),
            f"{worker}.forward_batch_generation": (self.forward, "AROUND"),
            f"{worker}._stub_skipped_draft_extend": (self.skip_extend, "AFTER"),
            f"{speculative}.spec_utils.generate_simulated_accept_index": (self.simulate, "REPLACE"),
            f"{speculative}.spec_utils.commit_mamba_states_after_verify": (self.commit_states, "AROUND"),
            "sglang.srt.managers.scheduler.Scheduler.handle_dumper_control": (self.answer, "AROUND"),
            **{target: (functools.partial(self.time, part), "AROUND") for target, part in parts.items()},
        }

    # Methods that sglang's AdaptiveController calls

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        """Pass the graphs' batch sizes on to the policy: a batch between two of them computes the larger one."""
        self._graph_sizes, self._started = cuda_graph_bs and sorted(cuda_graph_bs), True
        self.chooser.set_graph_sizes(self._graph_sizes or ())

    def cuda_graph_bs_for_step(self, _step: int) -> list[int] | None:
        return self._graph_sizes

    def get_steps_for_batch(self, _batch_size: int) -> int:
        return self.choice.steps

    def on_verify_complete(self, kept: list[int], _batch_size: int) -> None:
        """Keep a batch's numbers of kept drafts until `settle` knows which tokens the responses kept."""
        self._verified = kept

    # Hooks

    def settle(self, original: Callable, processor: Any, batch: Any, result: Any) -> None:
        """Complete the batch's row in the log, and let the policy learn from it, once responses have been cut."""
        tokens, self._verified = KeptTokens(batch.reqs), None
        original(processor, batch, result)
        if self._verified is None:
            return
        try:
            row = self.recorder.settle(self._verified, sum(tokens.count()))
        except Exception:  # noqa: BLE001 - an error of the log must not end the engine
            self.chooser.fail()
            return
        kept = [drafts for drafts, runs in zip(self._verified, tokens.running, strict=True) if runs]
        ends = Ends(row.tokens, tokens.ended(), row.batch - len(kept))
        self.chooser.observe(row.steps, len(kept), survivors_of(kept, row.steps), ends)

    def install(self, _result: None, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        """Connect to `worker`. Raises EngineError if sglang has turned adaptive speculation off, which it only logs."""
        if worker.adaptive_controller is None:
            raise EngineError("sglang turned adaptive speculation off, so draft steps cannot change; see its log above")
        worker.adaptive_controller.params = self
        self.worker = worker

    def forward(self, original: Callable, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_idle():
            reads_prompts = batch.forward_mode.is_extend() or batch.is_extend_in_batch
            (self._start_prefill if reads_prompts else self._start_decode)(batch)
        return original(worker, batch, *args, **kwargs)

    def skip_extend(self, _result: None, worker: Any, batch: Any, result: Any) -> None:
        """Read or keep the tokens of a step without speculation, for which sglang skips the drafter's pass."""
        if self.choice.warm:
            worker.draft_worker._draft_extend_for_decode(batch, result)
        elif not self.chooser.failed:
            features = result.logits_output.hidden_states
            # A graph writes its next output into the same memory.
            features = features.clone() if result.can_run_cuda_graph else features
            self.backlog.add(batch.reqs, result.next_token_ids, features)

    def simulate(self, *, accept_index, predict, num_correct_drafts, candidates, **_kwargs: Any) -> torch.Tensor:
        return self.acceptance.draw(accept_index, num_correct_drafts, predict, candidates)

    def commit_states(self, original: Callable, target_worker: Any, *args: Any) -> None:
        """Skip sglang's check for states to commit, which it repeats after every pass: its result is constant."""
        if self._has_states is None:
            from sglang.srt.configs.hybrid_arch import mambaish_config

            self._has_states = mambaish_config(target_worker.model_runner.model_config) is not None
        if self._has_states:
            original(target_worker, *args)

    def time(self, part: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.timing(part):
            return original(*args, **kwargs)

    def answer(self, original: Callable, scheduler: Any, request: Any) -> None:
        """Answer a message of this package, which is sent as a message to sglang's dumper."""
        if request.method != STEPS_MESSAGE:
            return original(scheduler, request)
        from sglang.srt.managers.io_struct import DumperControlReqOutput

        try:
            served = self.serve(scheduler.is_fully_idle(), **request.body)
            output = DumperControlReqOutput(success=True, response=[served])
        except Exception as error:  # noqa: BLE001 - here it would end the engine, so the trainer raises it
            busy = isinstance(error, RequestsRunningError)
            output = DumperControlReqOutput(success=False, response=[{"busy": busy}], error=str(error))
        scheduler.ipc_channels.send_to_tokenizer.send_output(output, request)
        return None

    def serve(self, idle: bool, settings: str | None = None, state: str | None = None) -> dict[str, bytes]:
        """Return the log. `settings`: DepthSettings as JSON, to apply; `state`: of the chooser, to restore."""
        if self.worker is None:
            raise EngineError("the engine made no EAGLE worker whose draft steps could change")
        if not (idle or settings is None and state is None):
            raise RequestsRunningError
        recorder, chooser = self.recorder, self.chooser
        if settings is not None:
            self.apply(DepthSettings.of_json(settings))
        elif idle:
            self.backlog.clear()
        if state is not None:
            self.chooser.load_state(state)
        more = {"state": chooser.state(), "graph_sizes": tuple(self._graph_sizes or ())}
        return {"log": replace(recorder.take(chooser.failures), **more).to_bytes()}

    def _start_prefill(self, batch: Any) -> None:
        self.backlog.remove(batch.reqs)
        self.recorder.begin(True, len(batch.reqs), _mean_length(batch), batch.extend_num_tokens or 0)

    def _start_decode(self, batch: Any) -> None:
        """Choose the steps of a decode batch, and let the drafter catch up if they need it."""
        count, behind = len(batch.reqs), sum(map(missed, batch.reqs))
        row = self.recorder.begin(False, count, _mean_length(batch))
        with self.recorder.timing("decide"):
            choice = self.chooser.choose(count, row.context, behind / count)
            row.predicted = self.chooser.predicted()
        if behind:
            choice = self._after_catch_up(batch, choice, behind)
        elif self.backlog.chunks:
            self.backlog.clear()  # its requests have finished
        self.choice, row.steps = choice, choice.steps

    def _after_catch_up(self, batch: Any, choice: Choice, behind: int) -> Choice:
        """Catch up if this batch needs the drafter or the backlog is full; return the choice that is then possible."""
        needed = choice.steps > 0 or choice.warm
        full = not self.chooser.failed and self.backlog.full(batch.reqs)
        if not needed and not full:
            return choice
        most = self.settings.catch_up_tokens
        if most is not None:
            most = max(most, 2 * len(batch.reqs))  # every step without speculation adds one token a sequence
        with self.recorder.timing("catch_up"):
            done = catch_up(self.worker, batch, self.backlog, most)
        self.recorder.rows[-1].caught_up = done
        return choice if done == behind else Choice(0, warm=False)


def _mean_length(batch: Any) -> float:
    """Return the mean tokens of a sequence so far; those before the last batch if the CPU has no newer count."""
    total = batch.seq_lens_sum
    if total is None:
        total = sum(len(request.origin_input_ids) + len(request.output_ids) for request in batch.reqs)
    return total / len(batch.reqs)
