"""meta.json, which makes a folder a checkpoint: facts about the model, the layout, and every other file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from respec_trainer.checkpoint.files import Facts
from respec_trainer.dtypes import DTYPES
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import file_digest

FORMAT = 2
META = "meta.json"


def is_checkpoint(folder: Path | str) -> bool:
    return (Path(folder) / META).is_file()


def sealed(meta: Mapping[str, Any]) -> str:
    """Return the text of meta.json: `meta` as JSON, with the format number and the XXH3-128 of the rest."""
    meta = json.loads(json.dumps({"format": FORMAT, **meta}))  # equal to what a reader gets
    return json.dumps({**meta, "xxh3_128": _seal(meta)}, indent=1) + "\n"


def _seal(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the contents of meta.json. Raises ConfigError if they are no checkpoint's, or were changed."""
    path = folder / META
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {META}: it is not a checkpoint, or was not completed") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{path} does not hold a JSON object; it is no checkpoint's")
    wanted = {"tp": int, "dp": int, "dtype": str, "optimizer": bool, "model": dict, "parameters": dict, "files": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(meta.get(key), kind)]
    if meta.get("format") != FORMAT or wrong or meta["dtype"] not in DTYPES:
        problem = f"without a valid {wrong[0]}" if wrong else f"of format {meta.get('format')}, {meta['dtype']}"
        names = " or ".join(DTYPES)
        raise ConfigError(f"{path} is {problem}; this version reads format {FORMAT}, of models in {names}")
    if _seal(meta) != meta.get("xxh3_128"):
        raise ConfigError(
            f"{path} is corrupted: its contents have the XXH3-128 {_seal(meta)}, but it says {meta.get('xxh3_128')}; "
            "use another checkpoint, or copy this file again"
        )
    return meta


def check_files(folder: Path, files: Mapping[str, Facts], names: Iterable[str]) -> str | None:
    """Return the problem of the first of `names` that differs from meta.json; None if none does. Reads whole files."""
    for name in names:
        problem = size_problem(folder, name, files[name]) or _content_problem(folder, name, files[name])
        if problem:
            return problem
    return None


def size_problem(folder: Path, name: str, facts: Facts) -> str | None:
    """Return the problem of a file that is missing or of another size than in meta.json; None if there is none.

    A file of the right size is not read.
    """
    path = folder / name
    if not path.is_file():
        return f"{path}, which {META} names, is missing"
    size = path.stat().st_size
    if size == facts["bytes"]:
        return None
    return (
        f"{path} holds {size:,} bytes with XXH3-128 {file_digest(path)}, but {META} says {facts['bytes']:,} with "
        f"{facts['xxh3_128']}"
    )


def _content_problem(folder: Path, name: str, facts: Facts) -> str | None:
    found = file_digest(folder / name)
    if found == facts["xxh3_128"]:
        return None
    return f"{folder / name} is corrupted: its XXH3-128 is {found}, but {META} says {facts['xxh3_128']}"
