"""Reads parts of tensors from a Hugging Face folder's safetensors files, without reading the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import MappedFile

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class HFFolder:
    """The tensors of a folder, in one safetensors file or in several with an index. Use it in a `with` statement.

    Raises ConfigError if there are none, or if a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, MappedFile] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            return _weight_map(index)
        single = self.folder / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single.name).names(), single.name)
        raise ConfigError(f"{self.folder} holds neither model.safetensors nor {INDEX}{_pickles(self.folder)}")

    def _open(self, name: str) -> MappedFile:
        if name not in self._files:
            self._files[name] = MappedFile(self.folder / name)
        return self._files[name]

    def check_index(self) -> None:
        """Open every file, and raise ConfigError unless the index names exactly the tensors that each one holds."""
        for file in self.files():
            listed = {name for name, holder in self._file_of.items() if holder == file}
            held = self._open(file).names()
            pairs = (("lacks", listed - held), ("holds, though the index does not say so,", held - listed))
            for problem, names in pairs:
                if names:
                    raise ConfigError(
                        f"{self.folder / file} {problem} {some(names)}; {INDEX} and the files are not of one model"
                    )

    def files(self) -> list[str]:
        """The names of the safetensors files."""
        return sorted(set(self._file_of.values()))

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open(self._file_of[name]).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._open(self._file_of[name]).dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the part of tensor `name` that `index` selects; all of it for (). Mapped: do not write into it."""
        return self._open(self._file_of[name]).read(name, index)

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *_) -> None:
        self._files.clear()  # this frees the memory maps


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} has no weight_map that can be read: {error!r}; copy it again") from error


def _pickles(folder: Path) -> str:
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not found:
        return ""
    return (
        f", but {', '.join(found[:3])}: pickles may run any code when they are read, and are not read here. Save the "
        f"model anew with transformers' save_pretrained, which writes safetensors"
    )


def some(names: Iterable[str]) -> str:
    """Return the first few names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
