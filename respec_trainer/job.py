"""Job: the parts of one run, built in order on every rank and ended in reverse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from respec_trainer.actor.engine import Actor
from respec_trainer.actor.parallel import Topology, init_parallel, shutdown_parallel
from respec_trainer.audit.rollouts import StepAudit
from respec_trainer.checkpoint.checkpoints import Checkpoints, Parts, Stateful
from respec_trainer.checkpoint.resume import run_to_continue
from respec_trainer.compat.precision import slow_dtype
from respec_trainer.config import Config
from respec_trainer.data.prompts import PromptStream, load_prompts
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.setup import setup_learner
from respec_trainer.dtypes import DTYPES
from respec_trainer.export import export_actor, export_drafter, set_aside
from respec_trainer.generation import Generation
from respec_trainer.hosts import check_hosts, check_shared_folder
from respec_trainer.resync import Resync
from respec_trainer.resync.alarm import AcceptAlarm
from respec_trainer.resync.canary import setup_canary
from respec_trainer.resync.transport import setup_transport
from respec_trainer.rewards.scoring import Scorer, Share
from respec_trainer.rollout.engine import RolloutEngine
from respec_trainer.rollout.fleet.fleet import RolloutFleet
from respec_trainer.rollout.remote.engine import RemoteEngine
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.speculation.algorithms import algorithm_of
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.profiling.settings import depth_settings
from respec_trainer.telemetry.recorder import new_run_folder
from respec_trainer.telemetry.report import Report
from respec_trainer.telemetry.timeline import Timeline
from respec_trainer.watchdog import Watchdog


class Job:
    """The parts that the training loop uses, as public attributes. They are built here to keep trainer.py short."""

    def __init__(self, config: Config, watchdog: Watchdog | None = None):
        """`watchdog`: runs already; the job reports to it when all ranks have met, and when a phase begins."""
        self.config = config
        self.topology: Topology = init_parallel(config)
        if watchdog:
            watchdog.met()
        # Small messages between the ranks use gloo on every machine, so that they never wait for a GPU stream.
        self.control = dist.new_group(backend="gloo")
        check_hosts(self.control)
        check_shared_folder(Path(config.run.dir), self.control)
        self.report = Report(config, self.topology.rank, self.control, run_folder, watchdog and watchdog.enter)
        if advice := slow_dtype(config.model.dtype, self.topology.device.type):
            self.report.notify(advice)
        self.clock = self.report.clock
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.pad_id = self.tokenizer.pad_token_id or 0
        self.sequence_multiple = self.topology.tp if config.actor.parallel.sequence_parallel else 1
        self.report.phase("loading the actor")
        self.actor = Actor(config, self.topology, total_updates=config.run.steps * config.objective.minibatches)
        self.objective = self.actor.objective
        self.audit = StepAudit(config, self.actor)
        prompts = load_prompts(config.data, self.tokenizer, context_limit(config, self.actor.hf_config))
        self.report.loaded(prompts)
        self.prompts = PromptStream(prompts, seed=config.run.seed, shuffle=config.data.shuffle)
        self.scorer = Scorer(config.reward, Share.of(self.topology), self.control)
        self.rank_info = LearnerRank.of(self.topology, config.objective.minibatches)
        self.learner = setup_learner(config, self.actor.hf_config, self.rank_info, self.control, self.report.notify)
        self.depth_settings = depth_settings(config, self.actor.hf_config, self.topology.device.type)
        self.report.phase("starting the rollout engine")
        if config.rollout.placement == "colocated":
            self.actor.offload()  # an engine sizes its cache by the memory that it finds free
        self.fleet = RolloutFleet(config, self._make_engine, self.control, self.topology.device.type)
        restarts, canary = config.rollout.engine.max_restarts, setup_canary(config.resync, config.model.dtype, prompts)
        self.generation = Generation(self.fleet, self._setup_resync(), self.actor, restarts, self.report.notify, canary)
        self.generation.sleep()  # brings the actor back to the device: it is resumed and pushed next
        self.alarm = AcceptAlarm(config.resync.accept_alarm, verified=config.resync.verify != "off")
        ranks = (self.topology.rank, self.topology.world_size)
        self.checkpoints = Checkpoints(config, self.report.folder, *ranks, self.control, self.report.notify)

    def _make_engine(self, index: int) -> RolloutEngine:
        settings = EngineSettings.from_config(self.config, device=self.topology.device.type, index=index)
        settings = replace(settings, steps=self.depth_settings)
        disaggregated = self.config.rollout.placement == "disaggregated"
        return RemoteEngine(settings, index) if disaggregated else SGLangEngine(settings)

    def _setup_resync(self) -> Resync:
        fleet, device = self.fleet, self.topology.device.type
        transport = setup_transport(self.config, device, fleet.engine, fleet.owners, self.control)
        drafter = self.learner if algorithm_of(self.config.speculation).pushes else None
        return Resync(self.config, self.actor, drafter, fleet.engine, transport, self.control)

    def resume(self, trainer: Stateful) -> int:
        """Load the checkpoint that `checkpoint.resume` selects. Return the steps it has done, 0 for a new run."""
        done = self.checkpoints.resume(self.parts(trainer))
        if done is not None:
            self.report.resumed(done)
        return done or 0

    def save(self, done: int, metrics: dict, trainer: Stateful) -> None:
        """Save the run if a save is due. The time it takes is part of the next step's time/checkpoint."""
        if self.checkpoints.due(done):
            with self.clock("checkpoint"):
                self.checkpoints.save(done, self.parts(trainer), metrics)

    def parts(self, trainer: Stateful) -> Parts:
        """Return the parts that a checkpoint holds."""
        shared = {"trainer": trainer, "prompts": self.prompts, "alarm": self.alarm, "audit": self.audit}
        shared["lengths"] = self.fleet.dealer
        own = {"fleet": self.fleet} | ({"learner": self.learner} if self.learner.stateful else {})
        folders = {"drafter": self.learner.copy_drafter} if algorithm_of(self.config.speculation).exports else {}
        return Parts(self.actor, shared, own, folders, immutable=("learner/buffer",))

    def timelines(self) -> list[Timeline]:
        """Return the timelines of the phase just collected, if engines log it, with the profile's plain decoding."""
        settings = self.depth_settings
        costs = CostModel.of_tuples(settings.costs, settings.graph_sizes) if settings and settings.costs else None
        return [Timeline.of(log, costs.step_seconds if costs else None) for log in self.generation.take_decode_log()]

    def my_rows(self, total: int) -> torch.Tensor:
        """Return the numbers of the samples of a step that this data-parallel rank trains on, in order."""
        return torch.tensor(self.rank_info.rows(total))

    def save_bad_batch(self, step: int, batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> Path:
        """Save the rows of a refused update, one file for each data-parallel rank. Return the folder."""
        folder = self.report.folder / "bad_batches"
        if self.topology.tp_rank == 0:
            folder.mkdir(exist_ok=True)
            record = {**vars(batch), "old_logprobs": old_logprobs, "advantages": advantages}
            torch.save(record, folder / f"step_{step + 1}_dp{self.topology.dp_rank}.pt")
        return folder

    def finish(self) -> None:
        """Export both models if `checkpoint.export_at_end` is set, and print the summary, after the last step."""
        if self.config.checkpoint.export_at_end:
            self.export()
        self.report.summary()

    def export(self) -> Path:
        """Write the current models into the run's folder: `actor`, a Hugging Face folder, and `drafter`.

        Every rank calls it. A drafter is written, trained or not, if the speculation algorithm exports one; it has
        the dtype in which engines hold it. Earlier exports of this run are renamed, not overwritten. Returns the
        actor's folder.
        """
        self.report.phase("exporting the actor")
        self.actor.onload()  # the engines are not needed any more, so the actor may use their memory
        actor, drafter = self.report.folder / "actor", self.report.folder / "drafter"
        first = self.topology.rank == 0
        for folder in (actor, drafter) if first else ():
            if earlier := set_aside(folder):
                self.report.notify(f"an earlier export of this run was moved to {earlier}")
        export_actor(self.actor, Path(self.config.model.path), actor)
        if first and algorithm_of(self.config.speculation).exports:
            export_drafter(self.learner.copy_drafter(), drafter, DTYPES[self.config.model.dtype])
        return actor

    def close(self) -> None:
        """End a completed job: the engine's processes, then the process groups."""
        self.report.close()
        self.fleet.shutdown()
        shutdown_parallel()


def run_folder(config: Config) -> Path:
    """Return the folder of the run to continue, or a new one."""
    return run_to_continue(config) or new_run_folder(config)


def context_limit(config: Config, hf_config) -> int:
    """Return the most tokens a prompt may have so that a full response fits the model's context."""
    return min(
        config.data.max_prompt_tokens, hf_config.max_position_embeddings - config.rollout.sampling.max_new_tokens
    )
