"""Fragments: the format in which a checkpoint's files hold an actor's weights and moments, and its index.

A fragment is a range of entries, from START on, of one flattened Megatron parameter's shard on tensor-parallel rank t.
Its key is "KIND/NAME/START", and it is in one of the files actor/tpT_dpD.safetensors with T = t. Together the files
cover every parameter exactly once, for every ZeRO stage. Kinds are "master" (float32 weights), "exp_avg" and
"exp_avg_sq" (AdamW's moments) if the optimizer was saved, and "weight" (in the model's dtype) if it was not.

There are two views of the index: `reader.FragmentReader`, for the ranges of one rank in any layout, and
`megatron_folder.MegatronFolder`, for whole shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import MappedFile

ACTOR = "actor/"  # the folder of the files with fragments
KINDS = ("master", "exp_avg", "exp_avg_sq")  # if the optimizer was saved
WEIGHT = "weight"  # the only kind if it was not

Shard = tuple[str, str, int]  # kind, parameter, tensor-parallel rank


@dataclass(frozen=True)
class SavedActor:
    """One rank's share of an actor, in host memory."""

    tp_rank: int
    dp_rank: int
    layout: dict[str, Any]  # for meta.json: tp, dp, zero, dtype, optimizer, parameters
    fragments: dict[str, torch.Tensor]  # by key, [length] float32
    counts: dict[str, int]  # counters, such as optimizer updates; the same on every rank


@dataclass(frozen=True)
class Fragment:
    """Entries start .. start + length of a flattened shard, stored as tensor `key` of `file`."""

    start: int
    length: int
    dtype: torch.dtype
    file: MappedFile
    key: str

    @property
    def stop(self) -> int:
        return self.start + self.length

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return entries start .. stop of the shard, which must be in this fragment; mapped, not copied."""
        whole = (start, stop) == (self.start, self.stop)
        return self.file.read(self.key, () if whole else (slice(start - self.start, stop - self.start),))


class FragmentIndex:
    """The fragments in the files `names` of a checkpoint's `folder`. Opens all files, but reads only requested entries.

    Raises ConfigError for a file that cannot be read, and for names and keys that do not have this format.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.shards: dict[Shard, list[Fragment]] = {}  # in the order of the entries
        for name in names:
            self._add(folder / name)
        for fragments in self.shards.values():
            fragments.sort(key=lambda fragment: (fragment.start, fragment.length))

    def read(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        """Return entries start .. stop, at least one, of a flattened shard: [stop - start].

        They are mapped from the file if one fragment has all of them, and copied otherwise. Raises ConfigError if the
        checkpoint lacks some.
        """
        parts: list[tuple[Fragment, int, int]] = []
        at = start
        for fragment in self.shards.get((kind, name, tp_rank), ()):
            end = min(fragment.stop, stop)
            if fragment.start <= at < end:
                parts.append((fragment, at, end))
                at = end
        if at < stop:
            raise ConfigError(f"{self.folder} lacks {kind} of {name} from entry {at} on, of tp rank {tp_rank}")
        if len(parts) == 1:
            return parts[0][0].read(start, stop)
        # Copied one by one, so that the mapped memory of one fragment can be freed before the next.
        out = torch.empty(stop - start, dtype=parts[0][0].dtype)
        for fragment, low, high in parts:
            out[low - start : high - start] = fragment.read(low, high)
        return out

    def _add(self, path: Path) -> None:
        file, tp_rank = MappedFile(path), _tp_rank(path)
        for key in file.names():
            kind, name, start = parse_key(key, path)
            length = torch.Size(file.shape(key)).numel()
            found = Fragment(start, length, file.dtype(key), file, key)
            self.shards.setdefault((kind, name, tp_rank), []).append(found)


def fragment_key(kind: str, name: str, start: int = 0) -> str:
    return f"{kind}/{name}/{start}"


def parse_key(key: str, path: Path) -> tuple[str, str, int]:
    """Return kind, parameter and start of a key in the file `path`. Raises ConfigError for an invalid key."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("/")
    if not name or not start.isdigit():
        raise ConfigError(f"{path}: {key} is not a fragment's key, such as weight/decoder.final_layernorm.weight/0")
    return kind, name, int(start)


def file_name(tp_rank: int, dp_rank: int) -> str:
    return f"{ACTOR}tp{tp_rank}_dp{dp_rank}.safetensors"


def _tp_rank(path: Path) -> int:
    match = re.fullmatch(r"tp(\d+)_dp\d+", path.stem)
    if match is None:
        raise ConfigError(f"{path} is not named tp0_dp0.safetensors or the like; remove it")
    return int(match[1])
