"""Folders that are complete or absent: filled under another name, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from respec_trainer.errors import ConfigError, RespecError

# Files of a Hugging Face folder that `carry_over` does not copy: weights in any format, and hidden files.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
LEFT_BEHIND = (*WEIGHTS, "*.gguf", "*.onnx", "*.h5", "*.msgpack", ".*", "__pycache__")


def check_place(out: Path, size: int) -> None:
    """Raise ConfigError unless `out` is absent or an empty folder, and the disk has room for `size` bytes.

    Unfinished folders of killed processes for the same `out` are removed, because they may fill the disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; nothing is overwritten: choose another path")
    _remove_leftovers(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ConfigError(f"{out} needs {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there; make room first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `out` at the end; after an exception it is removed.

    The unfinished folder of a killed process is removed by the next process that makes `out`. Raises RespecError if the
    disk is full.
    """
    with beside(out) as scratch:
        yield scratch
        sync(scratch)
        scratch.rename(out)
        sync_folder(out.parent)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Yield an empty folder .NAME.partial-PID beside `out`; at the end it is removed, if it still exists.

    The folder is locked while this process lives. Such folders without a lock were left by killed processes, and are
    removed first. Raises RespecError if the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    lock = _make_locked(scratch)  # released when this process ends, in any way
    try:
        yield scratch
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RespecError(f"the disk of {out} is full; nothing was written. Make room and try again") from error
        raise
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)


def _make_locked(folder: Path) -> int:
    """Make a folder and lock it. Return the lock's file descriptor, which the caller closes."""
    while True:
        folder.mkdir()
        with suppress(FileNotFoundError):  # another process removed it before it was locked: try again
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return lock
            os.close(lock)


def _remove_leftovers(out: Path) -> None:
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        handle = os.open(left, os.O_RDONLY)
        with suppress(BlockingIOError):  # its process is alive
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        os.close(handle)


def sync(folder: Path) -> None:
    """Sync every file and folder in `folder` to the disk."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def carry_over(source: Path, out: Path) -> None:
    """Copy a Hugging Face folder without its weights: config, tokenizer and so on."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
