"""Layout: the parts of Hugging Face tensors that make one Megatron parameter.

Megatron's full parameter is a sequence of segments, each a range of a Hugging Face tensor along one dimension, and
tensor-parallel rank r holds the r-th of `tp` equal cuts of it. For example with tp=2 and two key/value heads:

    linear_qkv  [ q heads of group 0 | k_0 | v_0 | q heads of group 1 | k_1 | v_1 ]      cut in two
    linear_fc1  [ gate, first half | up, first half | gate, second half | up, second half ]   cut in two
    embedding   [ embed_tokens | rows of zeros up to a multiple of tp ]                   cut in two
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# rule(hf_config, tp, prefix) lays out one parameter; `prefix` is the Hugging Face layer's path and a dot, or empty.
Rule = Callable[[Any, int, str], "Layout"]


@dataclass(frozen=True)
class Segment:
    """Entries start .. start + length of Hugging Face tensor `source`; padding if `source` is None."""

    source: str | None
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The segments of one Megatron parameter. `dim` is the dimension that is cut over tensor-parallel ranks.

    `dim` None: every rank holds the whole parameter, and its one segment is a whole Hugging Face vector.
    """

    dim: int | None
    segments: tuple[Segment, ...]

    def extents(self) -> dict[str, int]:
        """The size along `dim` that each Hugging Face tensor must have; empty for a replicated parameter."""
        sizes: dict[str, int] = {}
        for segment in self.segments if self.dim is not None else ():
            if segment.source is not None:
                sizes[segment.source] = sizes.get(segment.source, 0) + segment.length
        return sizes

    def cut(self, rank: int, tp: int) -> list[Segment]:
        """Return the segments, or parts of segments, in the `rank`-th of `tp` equal cuts."""
        share = sum(segment.length for segment in self.segments) // tp
        low, high, offset, inside = rank * share, (rank + 1) * share, 0, []
        for segment in self.segments:
            first, last = max(low, offset), min(high, offset + segment.length)
            if first < last:
                inside.append(Segment(segment.source, segment.start + first - offset, last - first))
            offset += segment.length
        return inside
