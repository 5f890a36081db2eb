"""The replay buffer: rollouts that the drafter learns from, in host memory, within a budget of bytes.

Each trainer rank has its own, with its own rows of each step. The rows of a step share a Snapshot of the actor's
embedding and output rows at that step: the stored hidden states give the actor's distribution only together with the
output weight of the same step. A snapshot holds embeddings only of tokens that occurred, far fewer than one a position
if responses are long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from respec_trainer.drafter.online.stored import Row, StoredStep
from respec_trainer.errors import ConfigError

MB = 1 << 20
Agree = Callable[[list[float]], list[float]]


class ReplayBuffer:
    """Rows within `budget` bytes, snapshots included. `retention` chooses which steps are dropped when they do not fit:

    - "recency": the oldest;
    - "reservoir": those of the lowest random keys, so that the rest is a fair sample of all steps.

    Steps are held whole, because a step's snapshot is freed only with its last row; only the last one that fits is held
    in part, and those behind it not at all, however small. Exact: every row of a step has the same probability to
    stay, whatever its length and rank (fair_sample.py), and under "reservoir" the order of the steps is uniform. Not
    exact: under "reservoir" a larger step is the one held in part more often. Of a step of a bytes relatively fewer
    rows stay than of one of b < a, by at most about (a - b) / 2 budgets where the budget holds several.

    Every rank calls `add` and `load_state_dict` equally often.

    Args:
        seed: the same on every rank. rank: makes the draws within a step differ between ranks.
        hold: rows of the newest step that stay until the next one comes, in half of the budget at most, even if
            "reservoir" drops the step: they are to be measured on.
        agree: returns the least of each number over all ranks.
    """

    def __init__(
        self,
        budget: int,
        retention: Literal["recency", "reservoir"] = "recency",
        seed: int = 0,
        rank: int = 0,
        hold: int = 0,
        agree: Agree = list,
    ):
        self.budget, self.retention, self.hold, self.agree = budget, retention, hold, agree
        self.steps: list[StoredStep] = []  # in the order in which they came
        # Three, because ranks draw the same lots, and what stays must not depend on how often a training chose rows.
        seeds = {"lots": seed, "orders": seed + 1 + 2 * rank, "choices": seed + 2 + 2 * rank}
        self.generators = {name: torch.Generator().manual_seed(number) for name, number in seeds.items()}
        self.added = 0  # steps
        self.used = False  # True once rows were added
        self.bar = -1.0  # the highest lot of a step that was dropped: steps below it come too late

    @property
    def rows(self) -> list[Row]:
        """All rows: the oldest step's first, and within a step in the order of a fair sample."""
        return [row for step in self.steps for row in step.rows]

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    def __len__(self) -> int:
        return sum(len(step.rows) for step in self.steps)

    def add(self, rows: Sequence[Row], batch: int) -> int:
        """Add this rank's rows of one step, maybe none, and drop what no longer fits.

        Returns the number of rows that were left out because the budget does not hold one of them alone. Raises
        ConfigError if it holds fewer than `batch` rows of the first step.
        """
        lot = torch.rand((), generator=self.generators["lots"], dtype=torch.float64).item()
        small = [row for row in rows if row.nbytes + row.snapshot.nbytes <= self.budget]
        lot = lot if self.retention == "reservoir" else self.added
        newest = StoredStep.of(small, self.added, lot, self.generators["orders"])
        self.steps.append(newest)
        self.added += 1
        fitting = round(newest.fits(self.budget) * len(small))
        self._fit()
        if not self.used and fitting < min(batch, len(rows)):
            raise ConfigError(self._too_small(rows, fitting, min(batch, len(rows))))
        self.used = self.used or bool(rows)
        return len(rows) - len(small)

    def choose(self, share: float) -> list[Row]:
        """Choose that share of the rows, rounded up, in the order to learn from them.

        Under "reservoir" they are random rows in random order. Under "recency" they are the newest rows, the newest
        step first and in random order within a step: generation may end before all are used, and the newest rows are
        closest to the current policy.
        """
        rows = self.rows
        count = -(-len(rows) // max(round(1 / share), 1))
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=self.generators["choices"])]
        if self.retention == "recency":
            shuffled.sort(key=lambda row: -row.step)
        return shuffled[:count]

    def newest(self, limit: int | None = None) -> list[Row]:
        """Return at most `limit` rows of the step that was added last, a fair sample of it; None: all that is left."""
        return [row for step in self.steps if step.number == self.added - 1 for row in step.rows][:limit]

    def _fit(self) -> None:
        """Cut every step to the share of it that fits on all ranks, and remove those of which nothing is left."""
        newest = next((step for step in self.steps if step.number == self.added - 1), None)
        held = min(newest.share_of(self.hold), newest.fits(self.budget // 2)) if newest else 0.0
        reserve = newest.most_bytes(held) if newest else 0
        room, shares = self.budget - reserve, []
        ranked = sorted(self.steps, key=lambda step: -step.lot)
        for step in ranked:
            before = reserve if step is newest else 0
            share = min(step.share, step.fits(room + before)) if room >= 0 and step.lot > self.bar else 0.0
            shares.append(max(share, held) if step is newest else share)
            room = room + before - step.nbytes if share == 1 else -1
        for step, share in zip(ranked, self.agree(shares), strict=True):
            step.cut(share)
            self.bar = self.bar if share else max(self.bar, step.lot)
        self.steps = [step for step in self.steps if step.share]

    def _too_small(self, rows: Sequence[Row], fitting: int, batch: int) -> str:
        needed = sum(sorted(row.nbytes for row in rows)[-batch:]) + rows[0].snapshot.nbytes
        return (
            f"the {self.budget / MB:.1f} MB that drafter.memory_mb leaves for rollouts hold {fitting} of the {batch} "
            f"responses that one drafter update takes on each rank: set it {-(-(needed - self.budget) // MB)} or more "
            "higher, or lower drafter.batch_size"
        )

    def state_dict(self) -> dict:
        """The whole buffer as plain tensors, numbers and lists."""
        steps = [step.state_dict() for step in self.steps]
        generators = {name: generator.get_state() for name, generator in self.generators.items()}
        return {"steps": steps, "generators": generators, "added": self.added, "used": self.used, "bar": self.bar}

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved buffer; rows that do not fit this buffer's budget are dropped.

        Raises ConfigError for a state of an earlier version, which held no fair sample.
        """
        if "steps" not in state:
            raise ConfigError(
                "the checkpoint's rollouts to learn from were saved by another version of respec_trainer, which this "
                "one does not read; finish that run with the version that began it, or start a new one with "
                "checkpoint.resume=never"
            )
        self.steps = [StoredStep.of_state(step) for step in state["steps"]]
        self.added, self.used, self.bar = state["added"], state["used"], state["bar"]
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        self._fit()
