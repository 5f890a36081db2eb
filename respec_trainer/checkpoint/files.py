"""Write the files of a checkpoint. A file is on the disk when the call returns its facts for meta.json."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from respec_trainer.weights.safetensors_io import CODES, SafetensorsWriter, Spec, file_digest

Facts = dict[str, int | str]  # about a file: "bytes" and "xxh3_128"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Facts:
    """Write CPU tensors as a safetensors file. Views, and tensors that share memory, are each written in full."""
    # The widest dtypes first, so that every tensor begins at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with named_errors(path), SafetensorsWriter(path, specs, metadata) as writer:
        for name, tensor in ordered.items():
            writer.write(name, tensor.detach())
    return {"bytes": writer.size, "xxh3_128": writer.digest}


def write_text(path: Path, text: str) -> Facts:
    """Write a text file."""
    with named_errors(path), path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return facts_of(path)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one: errors of writing, such as a full disk, have none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def facts_of(path: Path) -> Facts:
    """Return the size and digest of a file. Reads the whole file."""
    return {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}


def can_hold(dtype: torch.dtype) -> bool:
    """Return whether a file can hold tensors of `dtype`."""
    return dtype in CODES
