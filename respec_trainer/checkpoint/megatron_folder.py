"""Read the actor's state out of a checkpoint, parameter by parameter, however TP and ZeRO have cut it.

actor/tp{t}_dp{d}.safetensors holds fragments "{kind}/{parameter}/{start}": some entries, from `start`, of the
flattened shard of tensor-parallel rank t. Kinds are "master" (float32 weights), "exp_avg" and "exp_avg_sq" (AdamW's
moments) where the optimizer was saved, and "weight" (in the model's dtype) where it was not.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from respec_trainer.checkpoint.progress import Progress, Silent
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import MappedFile, file_digest

FORMAT = 2
META = "meta.json"
DTYPE_NAMES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WITH_OPTIMIZER, WITHOUT = ("master", "exp_avg", "exp_avg_sq"), ("weight",)


def is_checkpoint(folder: Path | str) -> bool:
    return (Path(folder) / META).is_file()


def sealed(meta: Mapping[str, Any]) -> str:
    """The text of meta.json: `meta` as JSON, with the format and the XXH3-128 of all else in it."""
    meta = json.loads(json.dumps({"format": FORMAT, **meta}))  # as it will be read
    return json.dumps({**meta, "xxh3_128": _seal(meta)}, indent=1) + "\n"


def _seal(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def read_meta(folder: Path) -> dict[str, Any]:
    """The contents of meta.json. Raises ConfigError where they are not those of a checkpoint, or not as written."""
    path = folder / META
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {META}: it is no checkpoint, or one that was not completed") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{path} does not hold a JSON object; it is no checkpoint's")
    wanted = {"tp": int, "dp": int, "dtype": str, "optimizer": bool, "model": dict, "parameters": dict, "files": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(meta.get(key), kind)]
    if meta.get("format") != FORMAT or wrong or meta["dtype"] not in DTYPE_NAMES:
        problem = f"without a valid {wrong[0]}" if wrong else f"of format {meta.get('format')}, {meta['dtype']}"
        names = " or ".join(DTYPE_NAMES)
        raise ConfigError(f"{path} is {problem}; this version reads format {FORMAT}, of models in {names}")
    if _seal(meta) != meta.get("xxh3_128"):
        raise ConfigError(
            f"{path} is corrupted: its contents have the XXH3-128 {_seal(meta)}, but it says {meta.get('xxh3_128')}; "
            "use another checkpoint, or copy this file again"
        )
    return meta


@dataclass(frozen=True)
class Piece:
    """One fragment: entries start .. start + length of a flattened shard."""

    start: int
    length: int
    path: Path
    key: str


class MegatronFolder:
    """The actor's shards in a checkpoint. Raises ConfigError where files are missing, or fragments do not fit."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.tp: int = self.meta["tp"]
        self.dtype = DTYPE_NAMES[self.meta["dtype"]]
        self.shapes = {name: tuple(shape) for name, shape in self.meta["parameters"].items()}
        self.kinds = WITH_OPTIMIZER if self.meta["optimizer"] else WITHOUT
        self._check_sizes()
        held = [self.folder / name for name in sorted(self.meta["files"]) if name.startswith("actor/")]
        try:
            self._files = {path: MappedFile(path) for path in held}
            self._pieces = self._locate()
            self._check_cover()
        except ConfigError:
            self.check_digests(Silent(), "actor/")  # a damaged file is the likely cause, and named with its checksums
            raise

    def shard(self, kind: str, name: str, tp_rank: int) -> torch.Tensor:
        """One tensor-parallel rank's shard of a parameter, whole; mapped from the file where one fragment holds it."""
        pieces = self._pieces[kind, name, tp_rank]
        if len(pieces) == 1:
            return self._read(pieces[0]).view(self.shapes[name])
        whole = torch.empty(torch.Size(self.shapes[name]).numel(), dtype=self.kind_dtype(kind))
        for piece in pieces:
            whole[piece.start : piece.start + piece.length] = self._read(piece)
        return whole.view(self.shapes[name])

    def kind_dtype(self, kind: str) -> torch.dtype:
        return self.dtype if kind == "weight" else torch.float32

    def _read(self, piece: Piece) -> torch.Tensor:
        return self._files[piece.path].read(piece.key)

    def check_digests(self, progress: Progress, within: str = "") -> None:
        """Read every file, or those within a folder, and raise ConfigError for one that meta.json does not speak of."""
        files = {name: facts for name, facts in self.meta["files"].items() if name.startswith(within)}
        progress.begin("checksums", sum(facts["bytes"] for facts in files.values()))
        for name, facts in files.items():
            found = file_digest(self.folder / name)
            if found != facts["xxh3_128"]:
                raise ConfigError(
                    f"{self.folder / name} is corrupted: its XXH3-128 is {found}, but {META} says "
                    f"{facts['xxh3_128']}; use another checkpoint, or copy this file again"
                )
            progress.advance(facts["bytes"])

    def _check_sizes(self) -> None:
        for name, facts in self.meta["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise ConfigError(f"{path}, which {META} names, is missing; use another checkpoint, or copy it again")
            if path.stat().st_size != facts["bytes"]:
                raise ConfigError(
                    f"{path} holds {path.stat().st_size:,} bytes with XXH3-128 {file_digest(path)}, but {META} says "
                    f"{facts['bytes']:,} with {facts['xxh3_128']}; use another checkpoint, or copy this file again"
                )

    def _locate(self) -> dict[tuple[str, str, int], list[Piece]]:
        pieces: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
        for path, file in self._files.items():
            place = re.fullmatch(r"tp(\d+)_dp(\d+)", path.stem)
            if place is None:
                raise ConfigError(f"{path} is not named tp0_dp0.safetensors or the like; remove it")
            for key in file.names():
                kind, name, start = _parts(key, path)
                if file.dtype(key) != self.kind_dtype(kind):
                    raise ConfigError(f"{path}: {key} is of dtype {file.dtype(key)}, not {self.kind_dtype(kind)}")
                pieces[kind, name, int(place[1])].append(Piece(start, torch.Size(file.shape(key)).numel(), path, key))
        for found in pieces.values():
            found.sort(key=lambda piece: (piece.start, piece.length))
        return pieces

    def _check_cover(self) -> None:
        """Raise ConfigError unless the fragments of every shard cover it exactly once."""
        wanted = {(kind, name, t) for kind in self.kinds for name in self.shapes for t in range(self.tp)}
        for kind, name, t in sorted(self._pieces.keys() ^ wanted):
            problem = "lacks" if (kind, name, t) in wanted else "holds, though meta.json does not say so,"
            raise ConfigError(f"{self.folder / 'actor'} {problem} {kind}/{name} of tensor-parallel rank {t}")
        for (kind, name, t), pieces in self._pieces.items():
            end = 0
            for piece in pieces:
                if piece.length and piece.start != end:
                    raise ConfigError(
                        f"{piece.path}: {piece.key} follows entry {end} of tensor-parallel rank {t}'s shard: entries "
                        f"{'are missing' if piece.start > end else 'are there twice'}"
                    )
                end += piece.length
            size = torch.Size(self.shapes[name]).numel()
            if end != size:
                raise ConfigError(
                    f"{self.folder / 'actor'}: {kind}/{name} of tensor-parallel rank {t} has {end} entries, not {size}"
                )


def _parts(key: str, path: Path) -> tuple[str, str, int]:
    """Kind, parameter and start of a fragment's key."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("/")
    if not name or not start.isdigit():
        raise ConfigError(f"{path}: {key} is not a fragment's key, such as weight/decoder.final_layernorm.weight/0")
    return kind, name, int(start)
