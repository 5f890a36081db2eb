"""Metrics of a step, computed from its samples and from the engines' logs of their decode batches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from respec_trainer.config import SamplingConfig, SpeculationConfig
from respec_trainer.rewards.contract import CORRECT
from respec_trainer.rollout.sample import UNDRAFTED, Sample, accept_length
from respec_trainer.speculation.acceptance import depth_acceptance
from respec_trainer.speculation.algorithms import algorithm_of, is_lossy
from respec_trainer.telemetry.timeline import Timeline, acceptance_by_depth, mean_by_time, pool, switches


def reward_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The `reward/*` metrics of scored samples. reward/skipped counts samples that the reward skipped, if any.

    solve_rate is the share of samples whose part "correct" is positive; without such a part their reward counts.
    parts/NAME is the mean of a named part over the samples that have it.
    """
    scored = [sample for sample in samples if sample.reward is not None]
    skipped = {"reward/skipped": len(samples) - len(scored)} if len(scored) < len(samples) else {}
    if not scored:
        return skipped
    rewards = [sample.reward for sample in scored]
    solved = sum(sample.reward_parts.get(CORRECT, sample.reward) > 0 for sample in scored)
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/solve_rate": solved / len(scored),
        **_part_means(scored),
        **skipped,
    }


def _part_means(samples: Sequence[Sample]) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.reward_parts)
    values = {name: [s.reward_parts[name] for s in samples if name in s.reward_parts] for name in names}
    return {f"reward/parts/{name}": statistics.fmean(found) for name, found in values.items()}


def rollout_metrics(samples: Sequence[Sample], seconds: float, sampling: SamplingConfig) -> dict[str, float]:
    """The `rollout/*` metrics: response tokens, the same per second of generation, mean length, share truncated.

    untruncated is 1 if the policy that is trained is not the one that samples (rollout.sampling.allow_untruncated).
    """
    lengths = [len(sample.response_ids) for sample in samples]
    return {
        "rollout/tokens": sum(lengths),
        "rollout/tokens_per_second": sum(lengths) / seconds,
        "rollout/response_length": statistics.fmean(lengths),
        "rollout/truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "rollout/untruncated": int(sampling.untruncated),
    }


def speculation_metrics(
    samples: Sequence[Sample], speculation: SpeculationConfig, timelines: Sequence[Timeline] = ()
) -> dict[str, float | list[float]]:
    """The `spec/*` metrics. lossy is 1 if verification may accept drafts that do not follow the policy's distribution.

    accept_length counts the tokens that responses kept a verify pass, the bonus token included. accept_by_depth[d-1] is
    the share of drafts accepted at depth d, given that those before it were, of all that were verified: also of those
    behind the end of a response, which it does not keep. off_fraction is the share of tokens drawn without speculation.
    It leaves out the first token of each response, which comes with the prompt, before any verify pass. For engines
    that log their batches, `step_metrics` adds metrics, and replaces shares of tokens by shares of time.
    """
    return _sample_metrics(samples, speculation) | step_metrics(timelines)


def _sample_metrics(samples: Sequence[Sample], speculation: SpeculationConfig) -> dict[str, float | list[float]]:
    decoded = [origin for sample in samples for origin in sample.origins[1:]]
    common = {
        "spec/off_fraction": decoded.count(UNDRAFTED) / max(len(decoded), 1),
        "spec/lossy": int(is_lossy(speculation)),
    }
    if not any(sample.verify_count for sample in samples):
        return common | {"spec/accept_length": 1.0, "spec/steps": 0, "spec/accept_by_depth": []}
    histogram = [sum(counts) for counts in zip_longest(*(s.accept_histogram for s in samples), fillvalue=0)]
    return common | {
        "spec/accept_length": accept_length(samples),
        "spec/steps": algorithm_of(speculation).depth(speculation),
        "spec/accept_by_depth": depth_acceptance(histogram),
    }


def step_metrics(timelines: Sequence[Timeline]) -> dict[str, float | list[float]]:
    """The `spec/*` metrics of the decode batches that engines logged, all engines together; empty without logs.

    steps, off_fraction, predicted_speedup and achieved_speedup are means by decode time, which is the time of the
    batches and between them. The last two need predictions and costs, and are left out without them. catch_up_share is
    the share of that time in which drafters read tokens drawn without them. decide_us is the time to choose the draft
    steps, in microseconds a batch.
    """
    failures = sum(line.log.failures for line in timelines)
    failed = {"spec/chooser_failures": failures} if any(len(line.log) for line in timelines) or failures else {}
    seconds = pool(timelines, lambda line: line.seconds)
    total = float(seconds.sum())
    if total <= 0:
        return failed
    steps = pool(timelines, lambda line: line.log.steps)
    predicted = pool(timelines, lambda line: line.log.predicted)
    earned = pool(timelines, lambda line: line.earned)
    known = predicted > 0
    metrics = {
        "spec/steps": mean_by_time(steps, seconds),
        "spec/off_fraction": mean_by_time(steps == 0, seconds),
        "spec/accept_by_depth": acceptance_by_depth(timelines),
        "spec/switches": switches(timelines),
        "spec/decide_us": 1e6 * float(pool(timelines, lambda line: line.log.decide).mean()),
        "spec/catch_up_share": float(pool(timelines, lambda line: line.log.catch_up).sum()) / total,
        "spec/predicted_speedup": mean_by_time(predicted[known], seconds[known]),
        "spec/achieved_speedup": None if np.isnan(earned).any() else float(earned.sum()) / total,
    }
    return failed | {name: value for name, value in metrics.items() if value is not None}
