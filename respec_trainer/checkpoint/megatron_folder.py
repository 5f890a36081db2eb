"""MegatronFolder: the actor's parameters in a checkpoint as whole shards, for every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import torch

from respec_trainer.checkpoint.fragments import ACTOR, KINDS, WEIGHT, Fragment, FragmentIndex, Shard
from respec_trainer.checkpoint.meta import check_files, read_meta, size_problem
from respec_trainer.checkpoint.progress import Progress, Silent
from respec_trainer.dtypes import DTYPES
from respec_trainer.errors import ConfigError

REMEDY = "use another checkpoint, or copy this file again"


class MegatronFolder:
    """The actor's shards in a checkpoint. Raises ConfigError if files are missing or fragments are inconsistent."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.tp: int = self.meta["tp"]
        self.dtype = DTYPES[self.meta["dtype"]]
        self.shapes = {name: tuple(shape) for name, shape in self.meta["parameters"].items()}
        self.kinds = KINDS if self.meta["optimizer"] else (WEIGHT,)
        self._check_sizes()
        try:
            self._index = FragmentIndex(self.folder, sorted(n for n in self.meta["files"] if n.startswith(ACTOR)))
            self._check_dtypes()
            self._check_cover()
        except ConfigError:
            self.check_digests(Silent(), ACTOR)  # a damaged file is the likely cause; its error is more exact
            raise

    def shard(self, kind: str, name: str, tp_rank: int) -> torch.Tensor:
        """Return one tensor-parallel rank's whole shard of a parameter; mapped if one fragment holds it."""
        shape = torch.Size(self.shapes[name])
        return self._index.read(kind, name, tp_rank, 0, shape.numel()).view(shape)

    def kind_dtype(self, kind: str) -> torch.dtype:
        return self.dtype if kind == WEIGHT else torch.float32

    def check_digests(self, progress: Progress, within: str = "") -> None:
        """Read every file whose name begins with `within`; raise ConfigError if one does not match meta.json."""
        files = {name: facts for name, facts in self.meta["files"].items() if name.startswith(within)}
        progress.begin("checksums", sum(facts["bytes"] for facts in files.values()))
        for name, facts in files.items():
            _refuse(check_files(self.folder, files, [name]))
            progress.advance(facts["bytes"])

    def _check_sizes(self) -> None:
        for name, facts in self.meta["files"].items():
            _refuse(size_problem(self.folder, name, facts))

    def _check_dtypes(self) -> None:
        for (kind, _, _), fragments in self._index.shards.items():
            for fragment in fragments:
                if fragment.dtype != self.kind_dtype(kind):
                    where = f"{fragment.file.path}: {fragment.key}"
                    raise ConfigError(f"{where} is of dtype {fragment.dtype}, not {self.kind_dtype(kind)}")

    def _check_cover(self) -> None:
        """Raise ConfigError unless the fragments of every shard cover it exactly once."""
        wanted = {(kind, name, t) for kind in self.kinds for name in self.shapes for t in range(self.tp)}
        for kind, name, t in sorted(self._index.shards.keys() ^ wanted):
            problem = "lacks" if (kind, name, t) in wanted else "holds, though meta.json does not say so,"
            raise ConfigError(f"{self.folder / ACTOR} {problem} {kind}/{name} of tensor-parallel rank {t}")
        for shard, fragments in self._index.shards.items():
            self._check_shard(shard, fragments)

    def _check_shard(self, shard: Shard, fragments: list[Fragment]) -> None:
        kind, name, t = shard
        end = 0
        for fragment in fragments:
            if fragment.length and fragment.start != end:
                raise ConfigError(
                    f"{fragment.file.path}: {fragment.key} follows entry {end} of tensor-parallel rank {t}'s shard: "
                    f"entries {'are missing' if fragment.start > end else 'are there twice'}"
                )
            end += fragment.length
        size = torch.Size(self.shapes[name]).numel()
        if end != size:
            raise ConfigError(
                f"{self.folder / ACTOR}: {kind}/{name} of tensor-parallel rank {t} has {end} entries, not {size}"
            )


def _refuse(problem: str | None) -> None:
    if problem:
        raise ConfigError(f"{problem}; {REMEDY}")
