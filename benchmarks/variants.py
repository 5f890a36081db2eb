"""Compare losses and weightings of the learner on the same samples; run by `benchmarks/learner.py variants`."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from statistics import fmean, stdev

import torch
from policies import Policy

from respec_trainer.config import Config
from respec_trainer.data.prompts import Prompt
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.format import load_drafter
from respec_trainer.drafter.loss import DepthSums, drafted_weights
from respec_trainer.drafter.online.updates import DrafterUpdates, Micro, drafter_loss
from respec_trainer.drafter.online.weighting import response_weights
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.errors import ConfigError
from respec_trainer.rewards.contract import RewardItem, score_batch
from respec_trainer.rewards.registry import reward_name, setup_reward
from respec_trainer.rewards.scoring import as_tensor

# (loss, weighting): the losses with equal weights, the weightings with the default loss.
VARIANTS = (
    ("kl", "uniform"),
    ("acceptance", "uniform"),
    ("log_acceptance", "uniform"),
    ("mixed", "uniform"),
    ("kl", "reward"),
    ("kl", "advantage"),
)
HELD_OUT_SEED = 1_000_000  # of the held-out prompts' order and draws; far from the seeds of training


class Comparison:
    """The policy, its drafter before training, and held-out responses; the same for every variant and seed."""

    def __init__(self, config: Config, args: argparse.Namespace):
        if config.rollout.sampling.temperature != 1:
            raise ConfigError("rollout.sampling.temperature must be 1: the teacher of this benchmark has temperature 1")
        self.config, self.args = config, args
        self.policy = Policy(args.actor, config.rollout.sampling)
        self.reward = setup_reward(config.reward)
        drafter, self.draft_ids = self.start()
        self.teacher = HFTeacher(args.actor, self.draft_ids, drafter.shape.feature_layers)
        prompts = self.policy.prompts(config, HELD_OUT_SEED, args.held_out)
        held_out = self.policy.draw(prompts, HELD_OUT_SEED)
        self.held_out_keys = {prompt.key for prompt in prompts}
        solved = self.rewards(held_out, prompts) > 0
        self.solved, self.failed = (self.taught(held_out, part.nonzero().flatten()) for part in (solved, ~solved))

    def start(self) -> tuple[Eagle3Drafter, torch.Tensor]:
        """Load the drafter of the run's configuration; return it and its draft vocabulary [Vd]."""
        return load_drafter(self.config.drafter.path, self.policy.model.config, dtype=torch.float32)

    def rewards(self, rollouts: DrafterBatch, prompts: list[Prompt]) -> torch.Tensor:
        """Score the responses to `prompts`, one each; return rewards [n]."""
        texts = self.policy.texts(rollouts)
        pairs = zip(texts, prompts, strict=True)
        items = [RewardItem(prompt.text, text, (), False, prompt.answer, prompt.row) for text, prompt in pairs]
        return as_tensor(score_batch(reward_name(self.config.reward), self.reward, items))

    def samples(self, seed: int) -> tuple[DrafterBatch, torch.Tensor]:
        """Draw a seed's responses to prompts that are not held out; return them and their rewards [prompts, n]."""
        group = self.config.rollout.samples_per_prompt
        candidates = self.policy.prompts(self.config, seed, self.args.prompts + self.args.held_out)
        chosen = [prompt for prompt in candidates if prompt.key not in self.held_out_keys][: self.args.prompts]
        prompts = [prompt for prompt in chosen for _ in range(group)]
        rollouts = self.policy.draw(prompts, seed)
        return rollouts, self.rewards(rollouts, prompts).view(-1, group)

    def taught(self, rollouts: DrafterBatch, index: torch.Tensor) -> list[Micro]:
        """Return the rows of `index` in micro-batches, with the teacher's outputs for them."""
        parts = [rollouts.rows(part) for part in index.split(self.config.drafter.micro_batch_size) if len(part)]
        return [(part, self.teacher(part)) for part in parts]

    def batches(self, rollouts: DrafterBatch, seed: int) -> list[list[Micro]]:
        """Return the micro-batches of each update. A row's weight is its index, which `train` replaces by a weight."""
        numbered = replace(rollouts, weights=torch.arange(len(rollouts), dtype=torch.float32))
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(rollouts), generator=generator) for _ in range(self.args.epochs)]
        return [self.taught(numbered, part) for order in orders for part in order.split(self.config.drafter.batch_size)]

    @torch.no_grad()
    def measure(self, drafter: Eagle3Drafter) -> dict[str, float]:
        """Measure on the held-out responses: accept lengths with `speculation.steps` drafts, and the first draft."""
        s = self.config.speculation.steps
        solved, failed = (self._sums(drafter, part) for part in (self.solved, self.failed))
        everything = (solved + failed).means()
        return {
            "accept_length": everything["accept_length"][s - 1],
            "accept_length_solved": solved.means()["accept_length"][s - 1],
            "alpha_1": everything["alpha"][0],
            "top1_1": everything["top1"][0],
            "kl_1": everything["loss"][0],
        }

    def _sums(self, drafter: Eagle3Drafter, micros: list[Micro]) -> DepthSums:
        settings = self.config.drafter.model_copy(update={"loss": "kl"})
        sums = DepthSums(*torch.zeros(len(fields(DepthSums)), settings.unroll))
        for batch, teacher in micros:
            sums += drafter_loss(drafter, batch, teacher, settings, temperature=1.0)[1]
        return sums


def compare(config: Config, args: argparse.Namespace) -> dict:
    """Train and measure every variant with every seed; the table has means and standard deviations over the seeds."""
    comparison = Comparison(config, args)
    before = comparison.measure(comparison.start()[0])
    found: dict[tuple[str, str], list[dict]] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        rollouts, rewards = comparison.samples(seed)
        updates = comparison.batches(rollouts, seed)
        for variant in VARIANTS:
            began = time.perf_counter()
            drafter = train(comparison, updates, rewards, *variant)
            seconds = time.perf_counter() - began
            found[variant].append({"seed": seed, "seconds": seconds, **comparison.measure(drafter)})
            print(*variant, found[variant][-1], flush=True)
    table = [{"loss": "none", "weighting": "none", **spread([before])}]
    table += [{"loss": loss, "weighting": weighting, **spread(runs)} for (loss, weighting), runs in found.items()]
    runs = [{"loss": loss, "weighting": weighting, "runs": runs} for (loss, weighting), runs in found.items()]
    facts = {"updates": len(updates), "responses": len(rollouts), "mean_reward": rewards.mean().item()}
    return {**facts, "before": before, "table": table, "variants": runs}


def train(
    comparison: Comparison, updates: list[list[Micro]], rewards: torch.Tensor, loss: str, weighting: str
) -> Eagle3Drafter:
    """Return the initial drafter after the learner's updates with this loss and weighting."""
    drafter, _ = comparison.start()
    settings = comparison.config.drafter.model_copy(update={"loss": loss, "weighting": weighting})
    weights = response_weights(rewards, weighting, settings.weight_scope)[0].flatten()
    learner = DrafterUpdates(drafter, settings, temperature=1.0)
    for micros in updates:
        weighted = [(replace(batch, weights=weights[batch.weights.long()]), teacher) for batch, teacher in micros]
        parts = [drafted_weights(b.response_mask.sum(1), b.weights, settings.unroll) for b, _ in weighted]
        totals = torch.stack(parts).sum(0).tolist()
        outcome = learner.step([lambda micro=micro: micro for micro in weighted], totals, may_go_on=lambda: True)
        if not outcome.applied:
            raise SystemExit(f"loss {loss}, weighting {weighting}: an update was not finite; lower drafter.lr")
    return drafter


def spread(runs: list[dict]) -> dict[str, str]:
    """Return the mean and standard deviation over runs of every figure, as text."""
    names = [name for name in runs[0] if name not in ("seed", "seconds")]
    columns = {name: [run[name] for run in runs] for name in names}
    return {name: f"{fmean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "") for name, v in columns.items()}
