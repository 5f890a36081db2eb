"""Metrics of a step that follow from its samples alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from respec_trainer.config import SpeculationConfig
from respec_trainer.rollout.sample import UNDRAFTED, Sample


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


def speculation_metrics(samples: Sequence[Sample], speculation: SpeculationConfig) -> dict[str, float | list[float]]:
    """`spec/*` over all verify passes of the samples. lossy: 1 if drafts were accepted beyond the policy's law.

    accept_length counts tokens a verify pass, the bonus token included. accept_by_depth[d-1] is the share of passes
    that accepted at least d drafts. off_fraction is the share of tokens drawn without speculation, among those that
    could have been: a response's first token comes with its prompt, before any verify pass.
    """
    passes = sum(sample.verify_count for sample in samples)
    decoded = [origin for sample in samples for origin in sample.origins[1:]]
    common = {
        "spec/off_fraction": decoded.count(UNDRAFTED) / max(len(decoded), 1),
        "spec/lossy": int(speculation.lossy),
    }
    if not passes:
        return common | {"spec/accept_length": 1.0, "spec/steps": 0, "spec/accept_by_depth": []}
    histogram = [0] * (speculation.depth + 1)
    for sample in samples:
        for depth, count in enumerate(sample.accept_histogram):
            histogram[depth] += count
    drafts = sum(depth * count for depth, count in enumerate(histogram))
    return common | {
        "spec/accept_length": 1.0 + drafts / passes,
        "spec/steps": speculation.depth,
        "spec/accept_by_depth": [sum(histogram[depth:]) / passes for depth in range(1, speculation.depth + 1)],
    }
