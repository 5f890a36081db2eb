"""Score the samples of a step once, so that every rank trains on the same numbers.

In each data-parallel copy of the model the first tensor-parallel rank scores a share of the prompts, and all ranks
receive all results. If every rank scored for itself, a reward that is not deterministic (a judge, a sandbox with a time
limit) would give the ranks of one copy different advantages, and their shards of the weights would diverge without an
error.
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
    """The share that this rank scores: number `dp_rank` of `dp` if `tp_rank` is 0, else nothing."""

    dp: int = 1
    dp_rank: int = 0
    tp_rank: int = 0

    @classmethod
    def of(cls, topology) -> Share:
        return cls(topology.dp, topology.dp_rank, topology.tp_rank)

    def samples(self, prompts: int, group: int) -> slice:
        """The samples to score of `prompts` groups of `group` samples: whole groups, split as equally as possible."""
        if self.tp_rank:
            return slice(0, 0)
        first, end = (part * prompts // self.dp * group for part in (self.dp_rank, self.dp_rank + 1))
        return slice(first, end)


class Scorer:
    """The reward of a run. Every rank makes one and calls it with the same items.

    Args:
        share: this rank's share; by default all. control: a gloo group of all ranks that train; None: the default one.

    Raises ConfigError if the reward cannot be set up.
    """

    def __init__(self, config: RewardConfig, share: Share = Share(), control: dist.ProcessGroup | None = None):
        self.name, self.reward = reward_name(config), setup_reward(config)
        self.share, self.control = share, control

    def __call__(self, items: Sequence[RewardItem], group: int) -> list[Score | None]:
        """Return the results of all items, the same on every rank; None: skipped.

        Args:
            items: the items of a step, the same on every rank; each `group` consecutive items share their prompt. A
                call of the reward gets whole groups.

        Raises the same RewardError on every rank if the reward fails or returns an invalid result on any.
        """
        mine = items[self.share.samples(len(items) // group, group)]
        results: list[Score | None] = []
        error = None
        try:
            results = score_batch(self.name, self.reward, mine) if mine else []
        except RewardError as raised:
            error = raised
        gathered = gather((results, error and str(error)), self.control)
        failures = [text for _, text in gathered if text]
        if failures:
            raise RewardError(failures[0]) from error
        return [result for part, _ in gathered for result in part]


def as_tensor(scores: Sequence[Score | None]) -> torch.Tensor:
    """The scores' values [n] in float32, NaN for a skipped sample."""
    return torch.tensor([math.nan if score is None else score.value for score in scores])
