"""The safetensors format, written tensor by tensor: the library's own writer needs a whole file in memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of every
tensor), and the tensors' bytes, without gaps. So a writer needs only names, dtypes and shapes in advance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from respec_trainer.errors import ConfigError

BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in BY_CODE.items()}
PIECE = 1 << 20  # bytes written, or read for a digest, at one time: they stay in the processor's cache
WRITEBACK = 1 << 26  # bytes written before they are sent to the disk
MAPPED = 1 << 28  # bytes read from a file before it is mapped again
HEADER_LIMIT = 100_000_000  # bytes; the library refuses to read a longer header


@dataclass(frozen=True)
class Spec:
    """The dtype and shape of a tensor, as in the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SafetensorsWriter:
    """Writes the tensors of `specs` to a new file, in their order. Use it in a `with` statement.

    A thread writes one tensor while the caller makes the next. After the statement the file is complete and on the
    disk, and `size` (bytes) and `digest` (XXH3, 128 bits) are set.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None):
        self.path, self.size, self.digest = path, 0, ""
        self._begun = 0  # bytes that were sent to the disk
        self._expected = list(specs.items())[::-1]
        self._hash = xxhash.xxh3_128()
        header = _header(specs, metadata or {"format": "pt"})
        if len(header) > HEADER_LIMIT:
            raise ValueError(
                f"{path}: {len(specs)} tensors make a header of {len(header)} bytes, above the format's limit"
            )
        self._file = path.open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._writing = self._thread.submit(self._put, header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of `specs`. The caller must not change it until the next call has returned.

        An error of writing is raised by the next call, or at the end of the statement.
        """
        given = name, Spec(tensor.dtype, tuple(tensor.shape))
        expected = self._expected.pop()
        if given != expected:
            raise ValueError(f"{self.path}: {given} where {expected} is next")
        content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        self._writing.result()
        self._writing = self._thread.submit(self._put, content)

    def _put(self, content: bytes | memoryview) -> None:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self._hash.update(piece)
            while len(piece):
                piece = piece[self._file.write(piece) :]
            self.size += min(PIECE, len(content) - start)
            if self.size - self._begun > WRITEBACK:
                # Starts to write pages that are not on the disk yet, so that fsync has less to do.
                os.posix_fadvise(self._file.fileno(), self._begun, self.size - self._begun, os.POSIX_FADV_DONTNEED)
                self._begun = self.size

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        with self._file, self._thread:  # closed in reverse order: the thread ends before the file is closed
            if kind is not None:
                return
            self._writing.result()
            if self._expected:
                raise ValueError(f"{self.path}: {len(self._expected)} tensors were not written")
            os.fsync(self._file.fileno())
        self.digest = self._hash.hexdigest()


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        span = [offset, offset + spec.nbytes]
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, so that they can be mapped
    return len(text).to_bytes(8, "little") + text


def open_safetensors(path: Path) -> safe_open:
    """Open a file lazily: the header is checked, tensors are read on request. Raises ConfigError if it is invalid."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}{_kind_of_content(path)}") from error


class MappedFile:
    """A file that is read tensor by tensor, without keeping in memory what was read.

    Tensors are mapped, not copied, and the pages of a mapping count as this process's memory once they were read. So
    the file is mapped again from time to time. An old mapping is freed with the last tensor that uses it.
    """

    def __init__(self, path: Path):
        self.path, self._file, self._read = path, open_safetensors(path), 0

    def names(self) -> set[str]:
        return set(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor. Raises ConfigError if this package does not support it."""
        code = self._file.get_slice(name).get_dtype()
        if code not in BY_CODE:
            raise ConfigError(f"{self.path}: {name} is of dtype {code}, which is not supported")
        return BY_CODE[code]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the part of tensor `name` that `index` selects; all of it for ()."""
        if self._read > MAPPED:
            self._file, self._read = open_safetensors(self.path), 0
        tensor = self._file.get_slice(name)[index] if index else self._file.get_tensor(name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor


def file_digest(path: Path) -> str:
    """Return the XXH3-128 of a file's content."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            state.update(piece)
    return state.hexdigest()


def _kind_of_content(path: Path) -> str:
    """Return the end of a message about an invalid file: that it is a pickle, or its size and digest to compare."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            "; it is a pickle, as torch.save writes, which may run any code when it is read and is not read here: save "
            "the model anew as safetensors"
        )
    size, digest = path.stat().st_size, file_digest(path)
    return f"; it holds {size:,} bytes with XXH3-128 {digest}: compare it with the original, and copy it again"


def plan_files(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Divide the names, in order, into files of at most `limit` bytes; a larger tensor has its own file."""
    files: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not files or spec.nbytes > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= spec.nbytes
    return files


def file_names(count: int) -> Sequence[str]:
    """Return the names that transformers and SGLang use for the files of a folder."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
