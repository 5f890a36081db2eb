"""Scores the samples of a step once, so that every rank trains on the same numbers.

Each data-parallel copy of the model scores a share of the prompts, by the first of its tensor-parallel ranks, and all
ranks are told all results. A reward that is not deterministic (a judge, a sandbox with a time limit) would otherwise
give the ranks of one copy different advantages, and their shards of the weights would drift apart without an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from respec_trainer.collectives import gather
from respec_trainer.config import RewardConfig
from respec_trainer.errors import RewardError
from respec_trainer.rewards.contract import RewardItem, Score, score_batch
from respec_trainer.rewards.registry import reward_name, setup_reward


@dataclass(frozen=True)
class Share:
    """What this rank scores: of `dp` shares that of `dp_rank`, if it is the first of its tensor-parallel ranks."""

    dp: int = 1
    dp_rank: int = 0
    tp_rank: int = 0

    @classmethod
    def of(cls, topology) -> Share:
        return cls(topology.dp, topology.dp_rank, topology.tp_rank)

    def samples(self, prompts: int, group: int) -> slice:
        """The samples to score of `prompts` times `group`: whole groups, as equally as they can be dealt."""
        if self.tp_rank:
            return slice(0, 0)
        first, end = (part * prompts // self.dp * group for part in (self.dp_rank, self.dp_rank + 1))
        return slice(first, end)


class Scorer:
    """The reward of a run. Every rank makes one and calls it alike.

    Args:
        share: this rank's; by default all. control: a gloo group of all ranks that train; None: the default group.

    Raises ConfigError where the reward cannot be set up.
    """

    def __init__(self, config: RewardConfig, share: Share = Share(), control: dist.ProcessGroup | None = None):
        self.name, self.reward = reward_name(config), setup_reward(config)
        self.share, self.control = share, control

    def __call__(self, items: Sequence[RewardItem], group: int) -> list[Score | None]:
        """The results of all items, the same on every rank; None: skipped.

        Args:
            items: of a step, the same on every rank; `group` items next to each other share their prompt. One call of
                the reward holds whole groups.

        Raises the same RewardError on every rank where the reward fails, or returns what is no result, on any.
        """
        mine = items[self.share.samples(len(items) // group, group)]
        results: list[Score | None] = []
        error = None
        try:
            results = score_batch(self.name, self.reward, mine) if mine else []
        except RewardError as raised:
            error = raised
        told = gather((results, error and str(error)), self.control)
        failures = [text for _, text in told if text]
        if failures:
            raise RewardError(failures[0]) from error
        return [result for part, _ in told for result in part]


def as_tensor(scores: Sequence[Score | None]) -> torch.Tensor:
    """The scores' values [n] in float32, NaN where the sample is skipped."""
    return torch.tensor([math.nan if score is None else score.value for score in scores])
