"""Convert between Hugging Face folders and checkpoints, one tensor in memory at a time.

Every source is read as Hugging Face tensors, so there are only two conversions: `write_hf` writes the tensors as they
are, and `write_shards` cuts them over tensor-parallel ranks. A change of the tensor-parallel size uses the second for
each kind of state in a checkpoint, because moments have the layout of their weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from respec_trainer.checkpoint.files import Facts, facts_of
from respec_trainer.checkpoint.fragments import ACTOR, WEIGHT, file_name, fragment_key
from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.meta import META, sealed
from respec_trainer.checkpoint.new_folder import carry_over, check_place, new_folder
from respec_trainer.checkpoint.progress import Progress, Silent
from respec_trainer.checkpoint.tensors import IGNORED, CheckpointTensors, Tensors, check_contents
from respec_trainer.dtypes import DTYPES, dtype_name, long_name
from respec_trainer.errors import ConfigError
from respec_trainer.models.registry import family_of
from respec_trainer.weights.hf_folder import INDEX, HFFolder
from respec_trainer.weights.hf_map import megatron_shapes, megatron_shard
from respec_trainer.weights.safetensors_io import SafetensorsWriter, Spec, file_names, plan_files

SHARD_BYTES = 4 << 30
WRITERS = ("respec_trainer", "torch", "transformers", "safetensors")


def to_megatron(source: Path, hf_config, out: Path, tp: int, dtype: torch.dtype | None, progress: Progress) -> None:
    """Write a Hugging Face folder's weights as a checkpoint of `tp` shards, without an optimizer, at step 0.

    Args:
        dtype: None keeps the weights' own dtype.

    Raises ConfigError, before anything is written, for damaged files or files of another model than `hf_config`.
    """
    with HFFolder(source) as files:
        files.check_index()
        check_contents(files, hf_config)
        _check_tied(files, hf_config)
        dtype = dtype or _one_dtype(files)
        kinds = {WEIGHT: dtype}
        check_place(out, _shards_size(kinds, hf_config, tp))
        with new_folder(out) as folder:
            carry_over(source, folder / "hf")
            set_dtype(folder / "hf" / "config.json", dtype)
            written = write_shards(folder, {WEIGHT: files}, kinds, hf_config, tp, progress)
            meta = {"step": 0, "tp": tp, "dp": 1, "zero": 0, "dtype": dtype_name(dtype), "optimizer": False}
            meta["model"] = json.loads((folder / "hf" / "config.json").read_text())
            write_meta(folder, meta, hf_config, written)


def reshard(checkpoint: MegatronFolder, hf_config, out: Path, tp: int, progress: Progress) -> None:
    """Write a checkpoint for `tp` tensor-parallel ranks: convert weights and moments, and copy the rest."""
    kinds = {kind: checkpoint.kind_dtype(kind) for kind in checkpoint.kinds}
    check_place(out, _shards_size(kinds, hf_config, tp))
    weights = CheckpointTensors(checkpoint, hf_config)
    views = {kind: weights.of_kind(kind) for kind in kinds}
    with new_folder(out) as folder, checked(checkpoint):
        shutil.copytree(checkpoint.folder, folder, ignore=_but_actor(checkpoint.folder), dirs_exist_ok=True)
        _spread_ranks(folder / "ranks", checkpoint.tp * checkpoint.meta["dp"], tp)
        written = write_shards(folder, views, kinds, hf_config, tp, progress)
        write_meta(folder, checkpoint.meta | {"tp": tp, "dp": 1}, hf_config, written)


@contextmanager
def checked(checkpoint: MegatronFolder) -> Iterator[None]:
    """Check the digest of every file while the `with` statement reads them, which is faster than one after the other.

    Raises ConfigError instead of any error inside the statement if a file is damaged, as this is the likely cause.
    """
    with ThreadPoolExecutor(1) as thread:
        check = thread.submit(checkpoint.check_digests, Silent())
        try:
            yield
        finally:
            check.result()


def _spread_ranks(folder: Path, before: int, after: int) -> None:
    """Give each of `after` ranks the state of rank (number mod `before`), like a run that resumes with other ranks."""
    if not folder.is_dir():
        return  # a converted folder, without the state of a run
    for rank in range(before, after):
        shutil.copyfile(folder / f"rank{rank % before}.safetensors", folder / f"rank{rank}.safetensors")
    for rank in range(after, before):
        (folder / f"rank{rank}.safetensors").unlink()


def checkpoint_to_hf(
    checkpoint: MegatronFolder, hf_config, out: Path, dtype: torch.dtype, progress: Progress, limit: int = SHARD_BYTES
) -> None:
    """Write a checkpoint's weights as a Hugging Face folder, in `dtype`, in files of at most `limit` bytes.

    Raises ConfigError if a file was changed since it was saved; then `out` does not exist.
    """
    source = CheckpointTensors(checkpoint, hf_config)
    check_place(out, sum(Spec(dtype, source.shape(name)).nbytes for name in source.names()))
    with new_folder(out) as folder, checked(checkpoint):
        carry_over(checkpoint.folder / "hf", folder)
        write_hf(folder, source, dtype, progress, limit)
        set_dtype(folder / "config.json", dtype)


def copy_drafter(source: Path, out: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Copy a drafter's folder, with its floating-point tensors cast to `dtype`."""
    with HFFolder(source) as files:
        held = {name: files.dtype(name) for name in files.names()}
        dtypes = {name: dtype if own.is_floating_point else own for name, own in held.items()}
        specs = {name: Spec(cast, files.shape(name)) for name, cast in dtypes.items()}
        ordered = dict(sorted(specs.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0])))
        total = sum(spec.nbytes for spec in specs.values())
        check_place(out, total)
        progress.begin("drafter", total)
        with new_folder(out) as folder:
            carry_over(source, folder)
            set_dtype(folder / "config.json", dtype, "torch_dtype")
            with SafetensorsWriter(folder / "model.safetensors", ordered) as writer:
                for name, spec in ordered.items():
                    writer.write(name, files.read(name).to(spec.dtype))
                    progress.advance(spec.nbytes)


def write_hf(folder: Path, source: Tensors, dtype: torch.dtype, progress: Progress, limit: int = SHARD_BYTES) -> None:
    """Write every tensor of `source`, cast to `dtype`, in one safetensors file or several with an index."""
    specs = {name: Spec(dtype, source.shape(name)) for name in source.names()}
    plan = plan_files(specs, limit)
    total = sum(spec.nbytes for spec in specs.values())
    progress.begin("Hugging Face", total)
    weight_map = {}
    for file, names in zip(file_names(len(plan)), plan, strict=True):
        with SafetensorsWriter(folder / file, {name: specs[name] for name in names}) as writer:
            for name in names:
                writer.write(name, source.read(name).to(dtype))
                progress.advance(specs[name].nbytes)
        weight_map |= dict.fromkeys(names, file)
    if len(plan) > 1:
        write_index(folder, weight_map, total)


def write_shards(
    folder: Path,
    sources: Mapping[str, Tensors],
    dtypes: Mapping[str, torch.dtype],
    hf_config,
    tp: int,
    progress: Progress,
) -> dict[str, Facts]:
    """Write actor/tp*_dp0.safetensors: the shards of every parameter, for each kind in `sources`, in the kind's dtype.

    Returns the size and digest of each file, by its name in `folder`.
    """
    shapes = megatron_shapes(hf_config, tp)
    specs = {
        fragment_key(kind, name): Spec(dtypes[kind], (torch.Size(shape).numel(),))
        for kind in sources
        for name, shape in shapes.items()
    }
    progress.begin("Megatron", _shards_size(dtypes, hf_config, tp))
    (folder / ACTOR).mkdir()
    names = [file_name(rank, 0) for rank in range(tp)]  # whole shards: not divided over data-parallel ranks
    with ExitStack() as files:
        writers = [files.enter_context(SafetensorsWriter(folder / name, specs)) for name in names]
        for kind, source in sources.items():
            for name in shapes:
                for rank, writer in enumerate(writers):
                    shard = megatron_shard(name, source.read, hf_config, rank, tp).view(-1)
                    writer.write(fragment_key(kind, name), shard.to(dtypes[kind]))
                    progress.advance(specs[fragment_key(kind, name)].nbytes)
    return {name: {"bytes": w.size, "xxh3_128": w.digest} for name, w in zip(names, writers, strict=True)}


def write_meta(folder: Path, meta: dict[str, Any], hf_config, written: Mapping[str, Facts]) -> None:
    """Write meta.json, the last of all files. `written` holds known sizes and digests; other files are read."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: written.get(name) or facts_of(folder / name) for name in names}
    parameters = {name: list(shape) for name, shape in megatron_shapes(hf_config, meta["tp"]).items()}
    versions = {package: version(package) for package in WRITERS}
    meta = {**meta, "parameters": parameters, "versions": versions, "files": files}
    (folder / META).write_text(sealed(meta))


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write the index from which transformers and SGLang learn which file holds which tensor."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def set_dtype(path: Path, dtype: torch.dtype, key: str = "dtype") -> None:
    """Set the dtype in a config.json. `key` is that of transformers 5; SGLang's drafters need its old "torch_dtype"."""
    config = json.loads(path.read_text())
    for known in ("torch_dtype", "dtype"):
        config.pop(known, None)
    config[key] = long_name(dtype)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _shards_size(dtypes: Mapping[str, torch.dtype], hf_config, tp: int) -> int:
    entries = sum(torch.Size(shape).numel() for shape in megatron_shapes(hf_config, tp).values())
    return tp * entries * sum(dtype.itemsize for dtype in dtypes.values())


def _but_actor(root: Path):
    """Return a filter for copytree that leaves out the actor's shards and meta.json, which are written again."""
    return lambda folder, names: {"actor", META} & set(names) if Path(folder) == root else set()


def _one_dtype(files: HFFolder) -> torch.dtype:
    found = {files.dtype(name) for name in files.names() if not name.endswith(IGNORED)}
    if len(found) > 1 or not found <= set(DTYPES.values()):
        names = ", ".join(sorted(map(long_name, found)))
        raise ConfigError(
            f"the weights in {files.folder} are of {names}; a checkpoint has one of bf16 and fp32: choose with --dtype"
        )
    return found.pop()


def _check_tied(files: HFFolder, hf_config) -> None:
    """Raise ConfigError for a head that differs from tied embeddings: it is not converted, so it would be lost."""
    names = family_of(hf_config).names
    head, embedding = names.head_weight, names.embedding_weight
    if not hf_config.tie_word_embeddings or head not in files.names():
        return
    if not torch.equal(files.read(head), files.read(embedding)):
        raise ConfigError(
            f"{files.folder} holds {head} unlike {embedding}, but config.json ties them; set "
            f"tie_word_embeddings=false, or remove {head}"
        )
