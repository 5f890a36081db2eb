"""FragmentReader: reads the part of a saved actor that one rank needs, whatever the layout it was saved at.

With another number of data-parallel ranks, or another ZeRO stage, a rank reads other ranges of the same shards. For
another tensor parallelism, `hf_map` gives the position of each row; moments have the layout of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from respec_trainer.checkpoint.fragments import FragmentIndex, file_name
from respec_trainer.errors import ConfigError
from respec_trainer.weights.hf_map import Layout, parameter_layout


@dataclass(frozen=True)
class Run:
    """A run of rows (or columns): `first` .. first + length of the target are those from `source` on of rank `rank`."""

    first: int
    length: int
    rank: int
    source: int


class FragmentReader:
    """Reads ranges of an actor's parameters from a checkpoint; reads only the bytes that are requested.

    Args:
        meta: the checkpoint's meta.json.
        hf_config: the Hugging Face config of both layouts.
        tp_rank, tp: the tensor-parallel rank and size of the reader.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], hf_config, tp_rank: int, tp: int):
        self.folder, self.hf_config, self.tp_rank, self.tp = folder, hf_config, tp_rank, tp
        self.saved_tp, self.shapes = meta["tp"], meta["parameters"]
        saved_ranks = range(self.saved_tp) if self.saved_tp != tp else [tp_rank]
        names = [file_name(saved_rank, dp_rank) for saved_rank in saved_ranks for dp_rank in range(meta["dp"])]
        self._index = FragmentIndex(self.folder, names)

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> torch.Tensor:
        """Return entries start .. start + length of the flattened shard `name` of `shape`: [length].

        Raises ConfigError if the checkpoint lacks some of them, or has the parameter in another shape.
        """
        if self.saved_tp == self.tp:
            self._check_shape(name, shape)
            return self._index.read(kind, name, self.tp_rank, start, start + length)
        return self._reshard(kind, name, shape, start, start + length)

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        if self.shapes.get(name) != list(shape):
            raise ConfigError(
                f"{self.folder}: {name} is of shape {self.shapes.get(name)} there, but {list(shape)} in this model"
            )

    def _reshard(self, kind: str, name: str, shape: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Return the same range from shards of another tensor parallelism, by joining the rows that hold it."""
        mine, theirs = (parameter_layout(name, self.hf_config, tp) for tp in (self.tp, self.saved_tp))
        if mine.dim is None:
            self._check_shape(name, shape)
            return self._index.read(kind, name, 0, start, stop)
        width = math.prod(shape[1:])
        first, last = start // width, -(-stop // width)
        runs = list(_runs(mine, self.tp_rank, self.tp, theirs, self.saved_tp))
        block = torch.zeros(last - first, width, dtype=torch.float32)  # padded rows are zero, and so are their moments
        fill = self._fill_rows if mine.dim == 0 else self._fill_columns
        fill(block, runs, kind, name, first)
        return block.flatten()[start - first * width : stop - first * width]

    def _fill_rows(self, block: torch.Tensor, runs: list[Run], kind: str, name: str, first: int) -> None:
        """Fill `block` [rows, width] with rows first .. of the target shard, from shards that are also cut by rows."""
        rows, width = block.shape
        for run in runs:
            low, high = max(run.first, first), min(run.first + run.length, first + rows)
            if low < high:
                row = run.source + low - run.first
                part = self._index.read(kind, name, run.rank, row * width, (row + high - low) * width)
                block[low - first : high - first] = part.view(-1, width)

    def _fill_columns(self, block: torch.Tensor, runs: list[Run], kind: str, name: str, first: int) -> None:
        """Fill `block` with rows first .. of the target shard, from the same rows of shards that hold other columns."""
        rows, width = len(block), self.shapes[name][1]
        for run in runs:
            part = self._index.read(kind, name, run.rank, first * width, (first + rows) * width).view(rows, width)
            block[:, run.first : run.first + run.length] = part[:, run.source : run.source + run.length]


def _runs(mine: Layout, rank: int, tp: int, theirs: Layout, saved_tp: int) -> Iterator[Run]:
    """Yield the source of each row (column) of shard `rank` of `tp` in the `saved_tp` saved shards.

    Rows of both layouts are matched by the Hugging Face rows that they come from.
    """
    saved = [(part, r, offset) for r in range(saved_tp) for part, offset in _with_offsets(theirs, r, saved_tp)]
    for wanted, offset in _with_offsets(mine, rank, tp):
        for part, saved_rank, saved_offset in saved:
            low = max(wanted.start, part.start)
            high = min(wanted.start + wanted.length, part.start + part.length)
            if part.source == wanted.source and low < high:
                yield Run(offset + low - wanted.start, high - low, saved_rank, saved_offset + low - part.start)


def _with_offsets(layout: Layout, rank: int, tp: int):
    """Yield the segments of a shard, without padding, each with its offset in the shard."""
    offset = 0
    for part in layout.cut(rank, tp):
        if part.source is not None:
            yield part, offset
        offset += part.length
