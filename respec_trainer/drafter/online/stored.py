"""What the replay buffer stores: rows, the snapshot of the actor that the rows of a step share, and whole steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from respec_trainer.drafter.online.fair_sample import FairSample


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
        return len(self.tokens) - self.response

    @property
    def response(self) -> int:
        """The number of tokens of the response."""
        return len(self.logsumexp)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


@dataclass
class StoredStep:
    """What is left of the rows of one step: a fair `share` of all that it had, in the order of `sample`.

    Steps are counted by `number`. Of several steps the one of the highest `lot` is dropped last.
    """

    number: int
    lot: float
    snapshot: Snapshot | None  # None: it had no rows
    rows: list[Row]
    sample: FairSample  # of all rows that it had
    share: float = 1.0

    @classmethod
    def of(cls, rows: Sequence[Row], number: int, lot: float, generator: torch.Generator) -> StoredStep:
        """Store all rows of a step, in an order that `generator` draws."""
        order, sample = FairSample.draw([row.nbytes for row in rows], generator)
        return cls(number, lot, rows[0].snapshot if rows else None, [rows[index] for index in order], sample)

    def share_of(self, count: int) -> float:
        """The share of the step that `count` of its rows are; 1 if it had no more."""
        return count / max(len(self.sample.keys), count, 1)

    def fits(self, room: int) -> float:
        """The largest share of the step that takes at most `room` bytes with its snapshot, whatever was drawn."""
        return self.sample.share(room - self._fixed)

    def most_bytes(self, share: float) -> int:
        """The most bytes that a share of the step takes with its snapshot, whatever was drawn."""
        return self.sample.most_bytes(share) + self._fixed if share else 0

    def cut(self, share: float) -> None:
        """Drop rows until this share of those that the step had is left."""
        self.share = min(self.share, share)
        if self.share < 1:
            del self.rows[self.sample.count(self.share) :]

    @property
    def _fixed(self) -> int:
        return self.snapshot.nbytes if self.snapshot else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and, if there are any, of their snapshot."""
        return sum(row.nbytes for row in self.rows) + (self._fixed if self.rows else 0)

    def state_dict(self) -> dict:
        """The step as plain tensors, numbers and lists; its snapshot is stored once."""
        rows = [{name: value for name, value in vars(row).items() if name != "snapshot"} for row in self.rows]
        snapshot = vars(self.snapshot) if self.snapshot else None
        return vars(self) | {"rows": rows, "snapshot": snapshot, "sample": vars(self.sample)}

    @classmethod
    def of_state(cls, state: dict) -> StoredStep:
        """The step that `state_dict` described."""
        snapshot = Snapshot(**state["snapshot"]) if state["snapshot"] else None
        rows = [Row(snapshot=snapshot, **row) for row in state["rows"]]
        return cls(**(state | {"rows": rows, "snapshot": snapshot, "sample": FairSample(**state["sample"])}))
