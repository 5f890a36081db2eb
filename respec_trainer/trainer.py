"""The loop of ReSpec (arXiv 2510.26475): generate while the drafter learns, score, update the policy, resync."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from respec_trainer.actor.engine import NonFiniteStep
from respec_trainer.data.prompts import Prompt
from respec_trainer.errors import AuditError, EngineLostError, TrainingError
from respec_trainer.rewards.contract import RewardItem
from respec_trainer.rewards.scoring import as_tensor
from respec_trainer.rollout.batch import Batch, collate
from respec_trainer.rollout.sample import Request, Sample, SamplingParams, with_seed
from respec_trainer.telemetry.metrics import reward_metrics, rollout_metrics, speculation_metrics

if TYPE_CHECKING:
    from respec_trainer.job import Job


class Trainer:
    """Drives a Job's parts, the same on every rank. Only rank 0's `job.report` writes or prints."""

    def __init__(self, job: Job):
        self.job, self.config = job, job.config
        self.bad_steps = 0  # refused steps in a row

    def run(self) -> None:
        """Train for `run.steps` steps. Raises TrainingError after `run.max_bad_steps` refused steps in a row.

        If the engines die too often, or samples fail their audit, the actor is exported before the error is raised.
        """
        try:
            first = self.job.resume(self)
            self.resync()
            self.job.clock.take()  # times of the start do not count for a step
            for step in range(first, self.config.run.steps):
                metrics = self.step(step)
                self.job.report.step(step, metrics)
                self.job.save(step + 1, metrics, self)
            self.job.checkpoints.wait()
        except (AuditError, EngineLostError) as error:
            raise type(error)(f"{error}; the current actor is saved in {self.job.export()}") from error

    def step(self, step: int) -> dict:
        """Run one iteration of the loop and return its metrics."""
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
            stats = self.train(step, batch, old.logprobs, advantages, ~rewards.flatten().isnan())
        self.resync()
        generation = rollout_metrics(samples, clock.seconds["generate"], self.config.rollout.sampling)
        speculation = speculation_metrics(samples, self.config.speculation, timelines)
        speculation |= self.check_acceptance(speculation.get("spec/accept_by_depth", []), samples[0].drafter_version)
        outcome = reward_metrics(samples) | generation | speculation | stats | audit
        return outcome | job.generation.metrics() | job.learner.metrics() | clock.take()

    def requests(self, step: int, prompts: list[Prompt]) -> list[Request]:
        """Return `samples_per_prompt` requests for each prompt; the requests of one prompt are next to each other."""
        settings, group = self.config.rollout.sampling, self.config.rollout.samples_per_prompt
        sampling = SamplingParams(**settings.model_dump(exclude={"seeded", "allow_untruncated"}))
        requests, seen = [], Counter()
        for prompt in prompts:
            # A prompt may come twice in a step. Its later requests have keys, and so seeds, of their own.
            first = seen[prompt.key]
            seen[prompt.key] += group
            requests += [Request(f"{step}:{prompt.key}:{first + i}", prompt.ids, sampling) for i in range(group)]
        return [with_seed(request, self.config.run.seed) for request in requests] if settings.seeded else requests

    def score(self, step: int, samples: list[Sample], prompts: list[Prompt]) -> torch.Tensor:
        """Set every sample's reward. Return the rewards as [prompts, samples_per_prompt], NaN for skipped samples."""
        texts = self.job.tokenizer.batch_decode([s.response_ids for s in samples], skip_special_tokens=True)
        group = self.config.rollout.samples_per_prompt
        owners = [prompt for prompt in prompts for _ in range(group)]
        items = [reward_item(*of_one) for of_one in zip(samples, texts, owners, strict=True)]
        scores = self.job.scorer(items, group)
        for sample, score in zip(samples, scores, strict=True):
            if score is not None:
                sample.reward, sample.reward_parts = score.value, dict(score.parts)
        self.job.report.samples(step, samples, [(item.prompt, item.response) for item in items])
        return as_tensor(scores).view(len(prompts), -1)

    def train(
        self, step: int, batch: Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor, scored: torch.Tensor
    ) -> dict:
        """Update the actor with this rank's rows. Rows that the reward skipped have no effect.

        Args:
            batch, old_logprobs: this rank's rows.
            advantages, scored: [samples] of the whole step; `scored` (bool) is False for skipped samples.
        """
        if not scored.any():
            return self.refuse(step, "the reward skipped every sample, so there is nothing to train on")
        mine = self.job.my_rows(len(scored))
        return self.update(step, batch.training_only(scored[mine]), old_logprobs, advantages[mine])

    def update(self, step: int, batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> dict:
        """Update the actor. A step with a non-finite loss or gradient changes nothing, and its batch is saved."""
        try:
            stats = self.job.actor.update(batch, old_logprobs, advantages)
        except NonFiniteStep as error:
            saved = self.job.save_bad_batch(step, batch, old_logprobs, advantages)
            return self.refuse(step, str(error), f"; its batch is saved in {saved}", error)
        self.bad_steps = 0
        return stats | {"policy/refused": 0}

    def refuse(self, step: int, why: str, more: str = "", error: Exception | None = None) -> dict:
        """Count a refused step, and notify the user. Raises TrainingError at run.max_bad_steps in a row."""
        self.bad_steps += 1
        self.job.report.notify(f"step {step + 1} refused: {why}{more}")
        if self.bad_steps >= self.config.run.max_bad_steps:
            raise TrainingError(f"{self.bad_steps} refused steps in a row (run.max_bad_steps): {why}") from error
        return {"policy/refused": 1}

    def resync(self) -> None:
        """Put the weights of both models into the engines."""
        with self.job.clock("resync"):
            self.job.generation.push()

    def check_acceptance(self, acceptance: list[float], drafter: str) -> dict:
        """Notify the user if drafts are accepted much less often than before the last push. Return the metric."""
        alarm = self.job.alarm.check(acceptance, drafter)
        if alarm:
            self.job.report.notify(alarm)
        return {"resync/accept_alarm": int(alarm is not None)}

    def state_dict(self) -> dict:
        return {"bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict) -> None:
        self.bad_steps = state["bad_steps"]


def reward_item(sample: Sample, text: str, prompt: Prompt) -> RewardItem:
    """Return the input of a reward for one sample; `text` is its response without special tokens."""
    truncated = sample.finish_reason == "length"
    return RewardItem(prompt.text, text, tuple(sample.response_ids), truncated, prompt.answer, prompt.row)
