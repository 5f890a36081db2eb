"""Write a checkpoint's files: on the disk when the call returns, and with what meta.json says of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from respec_trainer.weights.safetensors_io import CODES, SafetensorsWriter, Spec, file_digest

Facts = dict[str, int | str]  # of a file: "bytes" and "xxh3_128"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Facts:
    """Write CPU tensors as a safetensors file. Views, and tensors that share memory, are written out whole."""
    # The widest first: so every tensor begins at a multiple of its own width.
    ordered = dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with named_errors(path), SafetensorsWriter(path, specs, metadata) as writer:
        for name, tensor in ordered.items():
            writer.write(name, tensor.detach())
    return {"bytes": writer.size, "xxh3_128": writer.digest}


def write_text(path: Path, text: str) -> Facts:
    """Write a whole file."""
    with named_errors(path), path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return facts_of(path)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Opening a file says which it was if it fails; writing, on a full disk, does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def facts_of(path: Path) -> Facts:
    """What a file is now. It is read to the end."""
    return {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}


def can_hold(dtype: torch.dtype) -> bool:
    """Whether a file can hold tensors of `dtype`."""
    return dtype in CODES
