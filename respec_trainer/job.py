"""Job: the parts of one run, built in order on every rank and ended in reverse."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from respec_trainer.actor.engine import Actor
from respec_trainer.actor.parallel import Topology, init_parallel, shutdown_parallel
from respec_trainer.audit.rollouts import RolloutAudit
from respec_trainer.checkpoint.export import export_actor
from respec_trainer.config import Config
from respec_trainer.data.prompts import PromptStream, load_prompts
from respec_trainer.drafter.learner import setup_learner
from respec_trainer.drafter.record import Place
from respec_trainer.resync import Resync
from respec_trainer.resync.alarm import AcceptAlarm
from respec_trainer.resync.canary import setup_canary
from respec_trainer.resync.transport import setup_transport
from respec_trainer.rewards import setup_reward
from respec_trainer.rollout.fleet import RolloutFleet
from respec_trainer.rollout.sglang_engine import EngineSettings, SGLangEngine
from respec_trainer.rollouts import Rollouts
from respec_trainer.telemetry.report import Report


class Job:
    """What the loop needs. Attributes are public: trainer.py reads like the algorithm because they are built here."""

    def __init__(self, config: Config):
        self.config = config
        self.topology: Topology = init_parallel(config)
        # Small messages between ranks go over gloo on every machine, so that they never wait behind a GPU stream.
        self.control = dist.new_group(backend="gloo")
        self.report = Report(config, self.topology.rank, self.control)
        self.clock = self.report.clock
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.pad_id = self.tokenizer.pad_token_id or 0
        self.sequence_multiple = self.topology.tp if config.actor.parallel.sequence_parallel else 1
        self.report.phase("loading the actor")
        self.actor = Actor(config, self.topology, total_updates=config.run.steps * config.objective.minibatches)
        self.audit = RolloutAudit(config, self.actor)
        prompts = load_prompts(config.data, self.tokenizer, context_limit(config, self.actor.hf_config))
        self.report.loaded(prompts)
        self.prompts = PromptStream(prompts, seed=config.run.seed, shuffle=config.data.shuffle)
        self.reward = setup_reward(config.reward)
        place = Place.of(self.topology)
        self.learner = setup_learner(config, self.actor.hf_config, place, self.control, self.report.message)
        self.report.phase("starting the rollout engine")
        self.fleet = RolloutFleet(config, self._make_engine, self.control, self.topology.device.type)
        restarts, canary = config.rollout.engine.max_restarts, setup_canary(config.resync, config.model.dtype, prompts)
        self.rollouts = Rollouts(self.fleet, self._setup_resync(), self.actor, restarts, self.report.message, canary)
        self.alarm = AcceptAlarm(config.resync.accept_alarm, verified=config.resync.verify != "off")

    def _make_engine(self, index: int) -> SGLangEngine:
        return SGLangEngine(EngineSettings.from_config(self.config, device=self.topology.device.type, index=index))

    def _setup_resync(self) -> Resync:
        fleet, device = self.fleet, self.topology.device.type
        transport = setup_transport(self.config, device, fleet.engine, fleet.owners, self.control)
        drafter = self.learner if self.config.speculation.algorithm == "eagle3" else None
        return Resync(self.config, self.actor, drafter, fleet.engine, transport, self.control)

    def my_rows(self, total: int) -> slice:
        """The rows of a step's samples that this data-parallel rank trains on."""
        share = total // self.topology.dp
        return slice(self.topology.dp_rank * share, (self.topology.dp_rank + 1) * share)

    def save_bad_batch(self, step: int, batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> Path:
        """Save what this rank was about to train on; one file a data-parallel rank. Returns the folder."""
        folder = self.report.folder / "bad_batches"
        if self.topology.tp_rank == 0:
            folder.mkdir(exist_ok=True)
            record = {**vars(batch), "old_logprobs": old_logprobs, "advantages": advantages}
            torch.save(record, folder / f"step_{step + 1}_dp{self.topology.dp_rank}.pt")
        return folder

    def finish(self) -> None:
        """After the last step: export the actor if asked to, and print the summary."""
        if self.config.checkpoint.export_at_end:
            self.export()
        self.report.summary()

    def export(self) -> Path:
        """Write the actor as it is into the run's folder, as a Hugging Face folder. Every rank calls it."""
        self.report.phase("exporting the actor")
        self.actor.onload()  # the engines may have its room: they are not needed any more
        out = self.report.folder / "actor"
        export_actor(self.actor, Path(self.config.model.path), out)
        return out

    def close(self) -> None:
        """End a job that ran to its end: the engine's processes, then the process groups."""
        self.report.close()
        self.fleet.shutdown()
        shutdown_parallel()


def context_limit(config: Config, hf_config) -> int:
    """Tokens a prompt may have so that a full response still fits the model's context."""
    return min(
        config.data.max_prompt_tokens, hf_config.max_position_embeddings - config.rollout.sampling.max_new_tokens
    )
