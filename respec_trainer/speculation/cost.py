"""What decoding costs: for each part a formula of batch, context and shape with physical terms, and their sum.

    seconds = fixed + each B + passes ((weights + kv K)^p + (token T + pair P)^p)^(1/p)

of a part with B sequences whose passes process T tokens each, read K cached tokens and attend over P (query, key)
pairs. A pass reads memory and computes; p says how far the two hide each other: p = 1 not at all, p = infinity wholly,
which is the roofline model (Williams, Waterman and Patterson 2009). All terms are times and cannot be negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.shape import OFF, Shape

# rest: of a cycle, what is in none of its parts.
# What a measured time is of: a part of a speculative cycle, or a whole pass.
Part = Literal["plain", "draft", "verify", "extend", "catch_up", "resume", "prefill", "switch", "cycle"]
Piece = Part | Literal["rest"]


class Work(NamedTuple):
    """What a part does: floats, or arrays of one shape."""

    sequences: Any
    passes: Any
    tokens: Any  # a pass
    cached: Any  # tokens whose keys and values a pass reads
    pairs: Any  # of queries and keys, a pass

    @classmethod
    def of(cls, piece: Piece, shape: Shape, batch: float, context: float) -> Work:
        steps, topk, draft_tokens = shape
        read = batch * context
        if piece == "draft":  # the first token follows from the extend before it, without a pass
            return cls(batch, steps - 1, batch * topk, read, read * topk)
        if piece in ("catch_up", "prefill"):
            return cls.reading(batch, context, context)
        return cls(batch, 1, batch * draft_tokens, read, read * draft_tokens)

    @classmethod
    def reading(cls, batch: float, context: float, unread: float) -> Work:
        """A pass over the last `unread` of `context` tokens, each of which attends to all before it."""
        return cls(batch, 1, batch * unread, batch * (context - unread), batch * unread * (context - unread / 2))


@dataclass(frozen=True)
class Terms:
    """The formula's terms, in seconds each; `overlap` is p."""

    fixed: float = 0.0
    each: float = 0.0
    weights: float = 0.0
    kv: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    overlap: float = 1.0

    def seconds(self, work: Work) -> Any:
        return seconds(astuple(self), work)


def seconds(terms, work: Work) -> Any:
    """The formula, of seven terms in the order of Terms."""
    fixed, each, weights, kv, token, pair, p = terms
    memory, compute = weights + kv * work.cached, token * work.tokens + pair * work.pairs
    one_pass = memory + compute if p == 1 else (memory**p + compute**p) ** (1 / p)
    return fixed + each * work.sequences + work.passes * one_pass


@dataclass(frozen=True)
class CostModel:
    """Seconds of what an engine does with `batch` sequences whose contexts are `context` tokens on average.

    `fit.fit_costs` makes it from a profile. Batch and context may also be arrays. Raises ConfigError where the profile
    has no such times.
    """

    pieces: dict[Piece, Terms]

    @classmethod
    def of_tuples(cls, pieces: Mapping[str, Sequence[float]]) -> CostModel:
        """The inverse of `to_tuples`."""
        return cls({piece: Terms(*terms) for piece, terms in pieces.items()})

    def to_tuples(self) -> dict[str, tuple[float, ...]]:
        """Terms by piece as plain data, in the order of Terms."""
        return {piece: astuple(terms) for piece, terms in self.pieces.items()}

    def has(self, piece: Piece) -> bool:
        return piece in self.pieces

    def piece_seconds(self, piece: Piece, shape: Shape, batch: float, context: float) -> Any:
        return self._terms(piece).seconds(Work.of(piece, shape, batch, context))

    def _terms(self, piece: Piece) -> Terms:
        if piece not in self.pieces:
            raise ConfigError(f"the profile has no times of {piece}: measure it, in cells of at least 3 batch sizes")
        return self.pieces[piece]

    def step_seconds(self, batch: float, context: float) -> Any:
        """One decode step without speculation."""
        return self.piece_seconds("plain", OFF, batch, context)

    def cycle_seconds(self, shape: Shape, batch: float, context: float) -> Any:
        """One draft, verify and extend; with OFF, a decode step."""
        if shape == OFF:
            return self.step_seconds(batch, context)
        pieces = [piece for piece in ("draft", "verify", "extend", "rest") if piece != "rest" or self.has("rest")]
        return sum(self.piece_seconds(piece, shape, batch, context) for piece in pieces)

    def catch_up_seconds(self, batch: float, context: float, missed: float | None = None) -> Any:
        """What speculation takes to go on: the drafter reads the last `missed` tokens of each sequence, or all."""
        if missed is None:
            return self.piece_seconds("catch_up", OFF, batch, context)
        return self._terms("catch_up").seconds(Work.reading(batch, context, missed))

    def switch_seconds(self) -> float:
        """What any change of the steps takes; 0 where that was not measured."""
        return self.pieces["switch"].fixed if self.has("switch") else 0.0

    def prefill_seconds(self, batch: float, context: float) -> Any:
        """Reading `batch` prompts of `context` tokens."""
        return self.piece_seconds("prefill", OFF, batch, context)
