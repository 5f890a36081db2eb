"""The loop of ReSpec (arXiv 2510.26475): roll out, learn the drafter meanwhile, score, update the policy, resync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from respec_trainer.actor.engine import NonFiniteStep
from respec_trainer.data.prompts import Prompt
from respec_trainer.errors import AuditError, EngineLostError, TrainingError
from respec_trainer.rollout.batch import collate
from respec_trainer.rollout.sample import Request, Sample, SamplingParams, with_seed
from respec_trainer.telemetry.metrics import reward_metrics, rollout_metrics, speculation_metrics

if TYPE_CHECKING:
    from respec_trainer.job import Job


class Trainer:
    """Drives a Job's parts, the same on every rank. Only rank 0's `job.report` writes or prints."""

    def __init__(self, job: Job):
        self.job, self.config = job, job.config
        self.bad_steps = 0  # in a row

    def run(self) -> None:
        """Train for `run.steps` steps. Raises TrainingError after `run.max_bad_steps` refused steps in a row.

        If the engines keep dying, or samples fail their audit, the actor is exported before the error is raised.
        """
        try:
            first = self.job.resume(self)
            self.resync()
            self.job.clock.take()  # the start belongs to no step
            for step in range(first, self.config.run.steps):
                metrics = self.step(step)
                self.job.report.step(step, metrics)
                self.job.save(step + 1, metrics, self)
            self.job.checkpoints.wait()
        except (AuditError, EngineLostError) as error:
            raise type(error)(f"{error}; the actor as it is lies in {self.job.export()}") from error

    def step(self, step: int) -> dict:
        """One iteration of the loop; its metrics."""
        job, clock = self.job, self.job.clock
        prompts = job.prompts.next(self.config.data.prompts_per_step)
        with clock("generate"):
            job.generation.start(self.requests(step, prompts))
            with clock("learn"):
                job.learner.update(job.generation.generating)
            samples = job.generation.collect()
        timelines = job.timelines()
        job.report.rollout(step, samples, timelines)
        with clock("reward"):
            rewards = self.score(step, samples, prompts)
        with clock("wake"):
            job.generation.sleep()
        batch = collate(samples, job.pad_id, job.sequence_multiple).rows(job.my_rows(len(samples)))
        with clock("infer"):
            old = job.actor.infer(batch, job.learner.wants)
        with clock("audit"):
            audit = job.audit(step, batch)
        with clock("learn"):
            job.learner.observe(samples, old, rewards, clock.seconds["generate"])
        with clock("train"):
            advantages = job.objective.advantages(rewards).flatten()
            stats = self.update(step, batch, old.logprobs, advantages[job.my_rows(len(samples))])
        self.resync()
        generation = rollout_metrics(samples, clock.seconds["generate"])
        speculation = speculation_metrics(samples, self.config.speculation, timelines)
        speculation |= self.check_acceptance(speculation.get("spec/accept_by_depth", []), samples[0].drafter_version)
        outcome = reward_metrics(samples) | generation | speculation | stats | audit
        return outcome | job.generation.metrics() | job.learner.metrics() | clock.take()

    def requests(self, step: int, prompts: list[Prompt]) -> list[Request]:
        """`samples_per_prompt` requests a prompt, a group's next to each other."""
        settings = self.config.rollout.sampling
        sampling = SamplingParams(**settings.model_dump(exclude={"seeded"}))
        group = range(self.config.rollout.samples_per_prompt)
        requests = [Request(f"{step}:{prompt.key}:{i}", prompt.ids, sampling) for prompt in prompts for i in group]
        return [with_seed(request, self.config.run.seed) for request in requests] if settings.seeded else requests

    def score(self, step: int, samples: list[Sample], prompts: list[Prompt]) -> torch.Tensor:
        """Set every sample's reward; return them as [prompts, samples_per_prompt]."""
        texts = self.job.tokenizer.batch_decode([s.response_ids for s in samples], skip_special_tokens=True)
        owners = [prompt for prompt in prompts for _ in range(self.config.rollout.samples_per_prompt)]
        for sample, text, prompt in zip(samples, texts, owners, strict=True):
            sample.reward = self.job.reward(text, prompt.answer)
        self.job.report.samples(step, samples, [(p.text, t) for p, t in zip(owners, texts, strict=True)])
        return torch.tensor([s.reward for s in samples]).view(len(prompts), -1)

    def update(self, step: int, batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> dict:
        """Update the actor; a step with a non-finite loss or gradient changes nothing, and its batch is saved."""
        try:
            stats = self.job.actor.update(batch, old_logprobs, advantages)
        except NonFiniteStep as error:
            self.bad_steps += 1
            saved = self.job.save_bad_batch(step, batch, old_logprobs, advantages)
            self.job.report.notify(f"step {step + 1} refused: {error}; its batch is saved in {saved}")
            if self.bad_steps >= self.config.run.max_bad_steps:
                raise TrainingError(f"{self.bad_steps} refused steps in a row (run.max_bad_steps): {error}") from error
            return {"policy/refused": 1}
        self.bad_steps = 0
        return stats | {"policy/refused": 0}

    def resync(self) -> None:
        """Put the weights of both models into the engines."""
        with self.job.clock("resync"):
            self.job.generation.push()

    def check_acceptance(self, acceptance: list[float], drafter: str) -> dict:
        """Tell the user when drafts are accepted much less often than before the last push."""
        alarm = self.job.alarm.check(acceptance, drafter)
        if alarm:
            self.job.report.notify(alarm)
        return {"resync/accept_alarm": int(alarm is not None)}

    def state_dict(self) -> dict:
        return {"bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict) -> None:
        self.bad_steps = state["bad_steps"]
