"""FragmentReader: a checkpoint's fragments as one rank sees them that takes the place of saved ones, of any layout.

Another number of data-parallel ranks, or another ZeRO stage, reads other stretches of the same shards. Another tensor
parallelism goes by way of `hf_map`: moments lie as their weights do.
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
    """Rows, or columns, `first` .. first + length of what is wanted are those from `place` on of source rank `rank`."""

    first: int
    length: int
    rank: int
    place: int


class FragmentReader:
    """Reads stretches of an actor's parameters out of a checkpoint; only the bytes that are asked for.

    Args:
        meta: the checkpoint's meta.json. hf_config: the Hugging Face config that both layouts follow.
        tp_rank, tp: of the reader.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], hf_config, tp_rank: int, tp: int):
        self.folder, self.hf_config, self.tp_rank, self.tp = folder, hf_config, tp_rank, tp
        self.saved_tp, self.shapes = meta["tp"], meta["parameters"]
        saved_ranks = range(self.saved_tp) if self.saved_tp != tp else [tp_rank]
        names = [file_name(saved_rank, dp_rank) for saved_rank in saved_ranks for dp_rank in range(meta["dp"])]
        self._index = FragmentIndex(self.folder, names)

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> torch.Tensor:
        """Entries start .. start + length of the flattened shard `name` of `shape`; [length].

        Raises ConfigError where the checkpoint lacks some of them, or has the parameter in another shape.
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
        """The same from shards of another tensor parallelism: the rows that hold the stretch are put together."""
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
        """Rows first .. of the wanted shard into `block` [rows, width], from shards that were cut by rows too."""
        rows, width = block.shape
        for run in runs:
            low, high = max(run.first, first), min(run.first + run.length, first + rows)
            if low < high:
                place = run.place + low - run.first
                part = self._index.read(kind, name, run.rank, place * width, (place + high - low) * width)
                block[low - first : high - first] = part.view(-1, width)

    def _fill_columns(self, block: torch.Tensor, runs: list[Run], kind: str, name: str, first: int) -> None:
        """Rows first .. of the wanted shard into `block`, from the same rows of shards that hold other columns."""
        rows, width = len(block), self.shapes[name][1]
        for run in runs:
            part = self._index.read(kind, name, run.rank, first * width, (first + rows) * width).view(rows, width)
            block[:, run.first : run.first + run.length] = part[:, run.place : run.place + run.length]


def _runs(mine: Layout, rank: int, tp: int, theirs: Layout, saved_tp: int) -> Iterator[Run]:
    """Where each row (column) of the `rank`-th of `tp` cuts lies in `saved_tp` cuts, by way of Hugging Face's rows."""
    places = [(part, r, place) for r in range(saved_tp) for part, place in _placed(theirs, r, saved_tp)]
    for wanted, offset in _placed(mine, rank, tp):
        for part, saved_rank, place in places:
            low = max(wanted.start, part.start)
            high = min(wanted.start + wanted.length, part.start + part.length)
            if part.source == wanted.source and low < high:
                yield Run(offset + low - wanted.start, high - low, saved_rank, place + low - part.start)


def _placed(layout: Layout, rank: int, tp: int):
    """(segment, where it begins in the shard) of a cut, without padding."""
    offset = 0
    for part in layout.cut(rank, tp):
        if part.source is not None:
            yield part, offset
        offset += part.length
