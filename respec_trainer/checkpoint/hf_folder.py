"""Read parts of tensors out of a Hugging Face folder's safetensors files, without reading the rest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from respec_trainer.errors import ConfigError


class HFFolder:
    """The tensors of a folder, in one safetensors file or in several with an index. Use it in a `with` statement.

    Raises ConfigError where there are none, or where a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        single = self.folder / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        raise ConfigError(f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json")

    def _open(self, name: str) -> safe_open:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self.folder / name} cannot be read: {error}") from error
        return self._files[name]

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """The part of tensor `name` that `index` selects; all of it for ()."""
        file = self._open(self._file_of[name])
        return file.get_slice(name)[index] if index else file.get_tensor(name)

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *_) -> None:
        self._files.clear()  # nothing else holds the memory maps
