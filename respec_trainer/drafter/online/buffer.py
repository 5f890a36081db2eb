"""The replay buffer: rollouts that the drafter learns from, in host memory, within a budget of bytes.

Each trainer rank has its own. The rows of a step share a Snapshot of the actor's embedding and output rows at that
step: the stored hidden states give the actor's distribution only together with the output weight of the same step. A
snapshot holds embeddings only of tokens that occurred, far fewer than one a position if responses are long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from respec_trainer.errors import ConfigError

MB = 1 << 20


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights of the actor that scored a step: embeddings [n, H] of ascending token_ids [n], output_rows [Vd, H]."""

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    output_rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


@dataclass(frozen=True, eq=False)
class Row:
    """One response of R tokens with its prompt, L tokens in all."""

    tokens: torch.Tensor  # [L] int64
    features: torch.Tensor  # [L, 3H]
    hidden: torch.Tensor  # [R, H] after the final norm, at the position that predicts each response token
    logsumexp: torch.Tensor  # [R] float32, at the sampling temperature
    snapshot: Snapshot
    weight: float  # of the row in the loss
    step: int  # iteration that drew the response
    passes: int  # verify passes the engine needed

    @property
    def prompt(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.tokens) - len(self.logsumexp)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class ReplayBuffer:
    """Rows within `budget` bytes, snapshots included. `retention` chooses which rows are dropped when they do not fit:

    - "recency": the oldest rows first;
    - "reservoir": the rows of the steps with the lowest random keys, so that the rest is a fair sample of all steps.
      Rows of one step are neighbors in this order, because a step's snapshot is freed only with its last row.
    """

    def __init__(self, budget: int, retention: Literal["recency", "reservoir"] = "recency", seed: int = 0):
        self.budget, self.retention = budget, retention
        self.rows: list[Row] = []  # dropped from the front
        self.lots: list[float] = []  # random keys of the rows, ascending; all equal under "recency"
        self.generator = torch.Generator().manual_seed(seed)
        self.nbytes = 0
        self.used = False  # True once rows were added
        self._users: dict[Snapshot, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Sequence[Row], batch: int) -> None:
        """Add the rows of one step and drop what no longer fits.

        Raises ConfigError if fewer than `batch` of the first step's rows fit in the budget.
        """
        # The steps with the highest of equally distributed random keys are a uniform sample of all steps.
        lot = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        for row in rows:
            if row.nbytes + row.snapshot.nbytes > self.budget:
                continue
            self._insert(row, lot if self.retention == "reservoir" else 0.0)
            while self.nbytes > self.budget:
                self._remove(0)
        if not self.used and len(self.rows) < min(batch, len(rows)):
            batch = min(batch, len(rows))
            needed = sum(row.nbytes for row in rows[:batch]) + rows[0].snapshot.nbytes
            more = -(-(needed - self.budget) // MB)
            raise ConfigError(
                f"the {self.budget / MB:.1f} MB that drafter.memory_mb leaves for rollouts hold {len(self.rows)} of "
                f"the {batch} responses that one drafter update takes on each rank: set it {more} or more higher, or "
                "lower drafter.batch_size"
            )
        self.used = self.used or bool(rows)

    def choose(self, share: float) -> list[Row]:
        """Choose that share of the rows, rounded up, in the order to learn from them.

        Under "reservoir" they are random rows in random order. Under "recency" they are the newest rows, the newest
        step first and in random order within a step: generation may end before all are used, and the newest rows are
        closest to the current policy.
        """
        count = -(-len(self.rows) // max(round(1 / share), 1))
        shuffled = [self.rows[i] for i in torch.randperm(len(self.rows), generator=self.generator)]
        if self.retention == "recency":
            shuffled.sort(key=lambda row: -row.step)
        return shuffled[:count]

    def newest(self, limit: int) -> list[Row]:
        """Return at most `limit` rows of the newest step."""
        step = max((row.step for row in self.rows), default=0)
        return [row for row in self.rows if row.step == step][:limit]

    def _insert(self, row: Row, lot: float) -> None:
        position = bisect_right(self.lots, lot)
        self.rows.insert(position, row)
        self.lots.insert(position, lot)
        self.nbytes += row.nbytes
        users = self._users.get(row.snapshot, 0)
        self._users[row.snapshot] = users + 1
        self.nbytes += 0 if users else row.snapshot.nbytes

    def _remove(self, index: int) -> None:
        row = self.rows.pop(index)
        del self.lots[index]
        self.nbytes -= row.nbytes
        self._users[row.snapshot] -= 1
        if not self._users[row.snapshot]:
            del self._users[row.snapshot]
            self.nbytes -= row.snapshot.nbytes

    def state_dict(self) -> dict:
        """The whole buffer as plain tensors, numbers and lists; each snapshot is stored once."""
        numbers = {snapshot: number for number, snapshot in enumerate(self._users)}
        rows = [vars(row) | {"snapshot": numbers[row.snapshot]} for row in self.rows]
        snapshots = [vars(snapshot) for snapshot in numbers]
        return {"rows": rows, "snapshots": snapshots, "lots": self.lots, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved buffer; rows that do not fit this buffer's budget are dropped."""
        snapshots = [Snapshot(**snapshot) for snapshot in state["snapshots"]]
        self.rows, self.lots, self.nbytes, self._users = [], [], 0, {}
        for saved, lot in zip(state["rows"], state["lots"], strict=True):
            row = Row(**(saved | {"snapshot": snapshots[saved["snapshot"]]}))
            self.rows.append(row)
            self.lots.append(lot)
            self.nbytes += row.nbytes + (row.snapshot.nbytes if row.snapshot not in self._users else 0)
            self._users[row.snapshot] = self._users.get(row.snapshot, 0) + 1
        self.used = bool(self.rows)
        while self.nbytes > self.budget:
            self._remove(0)
        self.generator.set_state(state["generator"])
