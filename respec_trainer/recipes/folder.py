"""Folders that are made once: a folder keeps the hash of its recipe, and is not made again for the same recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from respec_trainer.checkpoint.new_folder import beside, sync, sync_folder
from respec_trainer.errors import ConfigError

RECIPE = "recipe.json"


def make_once(folder: Path, recipe: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> bool:
    """Make `folder` with `make`, unless an equal recipe made it before. Returns whether it was made now.

    `make` creates a new folder at the path it gets, next to the final one. The new folder replaces the final one only
    when complete, so an interrupted run leaves nothing that looks finished; the next call removes what a killed run
    left. The facts that `make` returns are kept in recipe.json.

    Raises ConfigError, and does not replace `folder`, if it holds something that no recipe made.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    made = read_recipe(folder)
    if made is not None and made["hash"] == digest:
        return False
    if made is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something else than a recipe's result; empty it or choose another folder")
    with beside(folder) as scratch:
        new = scratch / "new"
        facts = make(new)
        (new / RECIPE).write_text(json.dumps({"hash": digest, "recipe": recipe, "facts": facts}, indent=2) + "\n")
        sync(new)
        if folder.exists():
            folder.rename(scratch / "old")
        new.rename(folder)
        sync_folder(folder.parent)
    return True


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Read recipe.json: `hash`, `recipe`, `facts`. None if `folder` was not made by a recipe."""
    try:
        made = json.loads((folder / RECIPE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return made if isinstance(made, dict) and {"hash", "recipe", "facts"} <= made.keys() else None


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files (top level) with their names, recipe.json left out."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name != RECIPE)
    parts = [f"{file.name} {fingerprint(file)}\n" for file in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
