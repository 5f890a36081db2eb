"""Metrics of a step that follow from its samples alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from respec_trainer.rollout.sample import Sample


def reward_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`reward/*` of scored samples. solve_rate is the share of samples with a positive reward."""
    rewards = [sample.reward for sample in samples]
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/solve_rate": sum(reward > 0 for reward in rewards) / len(rewards),
    }


def rollout_metrics(samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    """`rollout/*`: response tokens, response tokens a second of generation, mean length, share cut off by length."""
    lengths = [len(sample.response_ids) for sample in samples]
    return {
        "rollout/tokens": sum(lengths),
        "rollout/tokens_per_second": sum(lengths) / seconds,
        "rollout/response_length": statistics.fmean(lengths),
        "rollout/truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }


def speculation_metrics(samples: Sequence[Sample], steps: int) -> dict[str, float | list[float]]:
    """`spec/*` over all verify passes of the samples.

    accept_length counts tokens a verify pass, the bonus token included. accept_by_depth[d-1] is the share of passes
    that accepted at least d drafts. off_fraction is the share of samples drawn without speculation, among those that
    could have been: a response's first token comes with its prompt, before any verify pass.
    """
    passes = sum(sample.verify_count for sample in samples)
    decoded = [sample for sample in samples if len(sample.response_ids) > 1]
    off = sum(not sample.verify_count for sample in decoded) / max(len(decoded), 1)
    if not passes:
        return {"spec/accept_length": 1.0, "spec/steps": 0, "spec/off_fraction": off, "spec/accept_by_depth": []}
    histogram = [0] * (steps + 1)
    for sample in samples:
        for depth, count in enumerate(sample.accept_histogram):
            histogram[depth] += count
    drafts = sum(depth * count for depth, count in enumerate(histogram))
    return {
        "spec/accept_length": 1.0 + drafts / passes,
        "spec/steps": steps,
        "spec/off_fraction": off,
        "spec/accept_by_depth": [sum(histogram[depth:]) / passes for depth in range(1, steps + 1)],
    }
