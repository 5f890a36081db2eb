"""The cost of decoding: for each part a formula of batch, context and shape with physical terms, and their sum.

    seconds = fixed + each B + passes ((weights + kv K)^p + (token T + pair P)^p)^(1/p)            attention within
    seconds = fixed + each B + passes (kv K + pair P + (weights^p + (token T)^p)^(1/p))            attention apart

for a part with B sequences whose passes process T tokens each, read K cached tokens and attend over P (query, key)
pairs. A pass reads memory and computes; p is how far the two overlap: p = 1 not at all, p = infinity completely, which
is the roofline model (Williams, Waterman and Patterson 2009). Where attention is a kernel of its own, as on GPUs, what
it reads is not hidden behind the other kernels' computing: the second form. All terms are times and cannot be negative.

A CUDA graph runs the batch size that it was captured with, so T counts the sequences of the smallest graph that holds
the batch. The padding has no context, and larger batches run without a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.shape import OFF, Shape

# The kinds of measured times: a part of a speculative cycle, or a whole pass. profiling/profile.py describes each.
Part = Literal["plain", "draft", "verify", "extend", "catch_up", "resume", "prefill", "switch", "cycle"]
# "rest": the time of a cycle that belongs to none of its parts.
Piece = Part | Literal["rest"]
# The pieces that CUDA graphs run. Prompts, and all that the drafter reads like one, have no graphs.
GRAPHED = ("plain", "draft", "verify", "extend")


class Work(NamedTuple):
    """The amount of work of a part: floats, or arrays of one shape."""

    sequences: Any
    passes: Any
    tokens: Any  # tokens that each pass processes
    cached: Any  # tokens whose keys and values each pass reads
    pairs: Any  # (query, key) pairs of each pass

    @classmethod
    def of(cls, piece: Piece, shape: Shape, batch: float, context: float, graphs: Sequence[int] = ()) -> Work:
        """The work of a piece; `graphs`: the batch sizes of the engine's CUDA graphs, rising."""
        steps, topk, draft_tokens = shape
        read = batch * context
        rows = graph_batch(batch, graphs) if piece in GRAPHED else batch
        if piece == "draft":  # the first token follows from the extend before it, without a pass
            return cls(batch, steps - 1, rows * topk, read, read * topk)
        if piece in ("catch_up", "prefill"):
            return cls.reading(batch, context, context)
        return cls(batch, 1, rows * draft_tokens, read, read * draft_tokens)

    @classmethod
    def reading(cls, batch: float, context: float, unread: float) -> Work:
        """The work of one pass over the last `unread` of `context` tokens, each of which attends to all before it."""
        return cls(batch, 1, batch * unread, batch * (context - unread), batch * unread * (context - unread / 2))


def graph_batch(batch: Any, graphs: Sequence[int]) -> Any:
    """Return the size of the smallest graph that holds the batch, or its own size if none does. Numbers or arrays."""
    if not len(graphs):
        return batch
    sizes = np.asarray(graphs, dtype=float)
    found = sizes[np.minimum(np.searchsorted(sizes, batch), len(sizes) - 1)]
    return np.where(np.asarray(batch) > sizes[-1], batch, found)[()]


@dataclass(frozen=True)
class Terms:
    """The formula's terms, in seconds each; `overlap` is p. `apart`: 1 if attention is a kernel of its own, else 0."""

    fixed: float = 0.0
    each: float = 0.0
    weights: float = 0.0
    kv: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    overlap: float = 1.0
    apart: float = 0.0

    def seconds(self, work: Work) -> Any:
        return seconds(astuple(self), work)


def seconds(terms, work: Work) -> Any:
    """Evaluate the formula for eight terms in the order of Terms."""
    fixed, each, weights, kv, token, pair, p, apart = terms
    reading, attending = kv * work.cached, pair * work.pairs
    within = 1 - apart
    memory, compute = weights + within * reading, token * work.tokens + within * attending
    one_pass = memory + compute if p == 1 else (memory**p + compute**p) ** (1 / p)
    return fixed + each * work.sequences + work.passes * (one_pass + apart * (reading + attending))


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds of an engine's work on `batch` sequences whose contexts are `context` tokens on average.

    `fit.fit_costs` makes one from a profile. Batch and context may also be arrays. Methods raise ConfigError if the
    profile has no times of the piece. `graphs`: the batch sizes of the engine's CUDA graphs, rising; empty: none.
    """

    pieces: dict[Piece, Terms]
    graphs: tuple[int, ...] = ()

    @classmethod
    def of_tuples(cls, pieces: Mapping[str, Sequence[float]], graphs: Sequence[int] = ()) -> CostModel:
        """Make a model from the result of `to_tuples`."""
        return cls({piece: Terms(*terms) for piece, terms in pieces.items()}, tuple(graphs))

    def to_tuples(self) -> dict[str, tuple[float, ...]]:
        """Return the terms of each piece as plain data, in the order of Terms."""
        return {piece: astuple(terms) for piece, terms in self.pieces.items()}

    def has(self, piece: Piece) -> bool:
        return piece in self.pieces

    def piece_seconds(self, piece: Piece, shape: Shape, batch: float, context: float) -> Any:
        return self._terms(piece).seconds(Work.of(piece, shape, batch, context, self.graphs))

    def _terms(self, piece: Piece) -> Terms:
        if piece not in self.pieces:
            raise ConfigError(f"the profile has no times of {piece}: measure it, in cells of at least 3 batch sizes")
        return self.pieces[piece]

    def step_seconds(self, batch: float, context: float) -> Any:
        """Seconds of one decode step without speculation."""
        return self.piece_seconds("plain", OFF, batch, context)

    def cycle_seconds(self, shape: Shape, batch: float, context: float) -> Any:
        """Seconds of one cycle: draft, verify and extend; with OFF, of a decode step."""
        if shape == OFF:
            return self.step_seconds(batch, context)
        pieces = [piece for piece in ("draft", "verify", "extend", "rest") if piece != "rest" or self.has("rest")]
        return sum(self.piece_seconds(piece, shape, batch, context) for piece in pieces)

    def catch_up_seconds(self, batch: float, context: float, missed: float | None = None) -> Any:
        """Seconds that the drafter needs to read the last `missed` tokens of each sequence, or all of them."""
        if missed is None:
            return self.piece_seconds("catch_up", OFF, batch, context)
        return self._terms("catch_up").seconds(Work.reading(batch, context, missed))

    def switch_seconds(self) -> float:
        """Seconds of a change of the number of draft steps; 0 if that was not measured."""
        return self.pieces["switch"].fixed if self.has("switch") else 0.0

    def prefill_seconds(self, batch: float, context: float) -> Any:
        """Seconds to read `batch` prompts of `context` tokens."""
        return self.piece_seconds("prefill", OFF, batch, context)
