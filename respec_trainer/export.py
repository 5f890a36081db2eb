"""Write the trained models as folders: the actor for transformers and SGLang, the drafter for SGLang."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from respec_trainer.checkpoint.files import write_tensors
from respec_trainer.checkpoint.new_folder import beside, carry_over, check_place, new_folder, sync_folder
from respec_trainer.checkpoint.progress import Silent
from respec_trainer.convert.convert import SHARD_BYTES, copy_drafter, set_dtype, write_index
from respec_trainer.resync.stream import ActorStream
from respec_trainer.resync.workspace import Workspace
from respec_trainer.weights.hf_map import hf_model_shapes
from respec_trainer.weights.safetensors_io import Spec, file_names


def export_actor(actor, source: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights of `actor` to `out`; copy config, tokenizer and other files from `source`.

    Every rank must call it. Rank 0 writes, shard by shard, into a folder beside `out` and renames it at the end: `out`
    is complete or absent. Raises ConfigError if `out` is not empty.
    """
    writes = actor.topology.rank == 0
    files: list[list[str]] = []
    total = 0
    dtype, workspace = next(actor.engine.module.parameters()).dtype, Workspace(actor.topology.device)
    with ExitStack() as stack:
        if writes:
            check_place(out, _size(actor.hf_config, dtype))
            folder = stack.enter_context(new_folder(out))
            carry_over(source, folder)
        for gathered in ActorStream(actor, [0], shard_bytes, dtype, workspace):
            if writes:
                tensors = {name: tensor.cpu() for name, tensor in gathered.copy(workspace)}
                total += sum(t.numel() * t.element_size() for t in tensors.values())
                write_tensors(folder / _partial_name(len(files)), tensors)
                files.append(list(tensors))
        if writes:
            _name_files(folder, files, total)
            set_dtype(folder / "config.json", dtype)


def export_drafter(make: Callable[[Path], None], out: Path, dtype: torch.dtype) -> None:
    """Write a drafter to `out`, its weights rounded to `dtype`. `make` writes the drafter into the folder it is given.

    The result is that of `respec-convert drafter` for a checkpoint. One rank calls it. `out` is complete or absent.
    Raises ConfigError if `out` is not empty.
    """
    check_place(out, 0)
    with beside(out) as scratch:
        make(scratch / "made")
        copy_drafter(scratch / "made", scratch / "cast", dtype, Silent())
        (scratch / "cast").rename(out)
        sync_folder(out.parent)


def set_aside(folder: Path) -> Path | None:
    """Rename `folder`, if it exists, to NAME.earlier-1 or the next free number. Return the new path, or None."""
    if not folder.exists():
        return None
    number = 1
    while (path := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    return folder.rename(path)


def _size(hf_config, dtype: torch.dtype) -> int:
    return sum(Spec(dtype, shape).nbytes for shape in hf_model_shapes(hf_config).values())


def _partial_name(index: int) -> str:
    return f"shard-{index}.safetensors"


def _name_files(folder: Path, files: list[list[str]], total: int) -> None:
    """Rename the files to the names that transformers expects, which contain their number, and write the index."""
    weight_map = {}
    for index, (names, final) in enumerate(zip(files, file_names(len(files)), strict=True)):
        (folder / _partial_name(index)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        write_index(folder, weight_map, total)
