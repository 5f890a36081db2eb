"""The folder checkpoints/ of a run: publishes, finds and removes checkpoints.

A checkpoint is filled as .step_N.partial-PID, synced to the disk, and renamed to step_N; then the pointer `latest` is
replaced, also by a rename. So at any time, even if a process or the machine dies, every folder step_N is complete, and
`latest` names one of them. Other names begin with a dot and are removed when the run resumes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from respec_trainer.checkpoint.files import Facts, facts_of, write_text
from respec_trainer.checkpoint.meta import META, sealed
from respec_trainer.checkpoint.new_folder import sync, sync_folder
from respec_trainer.errors import ConfigError


def step_of(folder: Path) -> int | None:
    """Return the N of step_N; None for any other name."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else None


def checkpoints_in(root: Path) -> list[Path]:
    """Return the folders step_N in `root`, valid or not, the newest first; [] if there is no `root`."""
    found = [path for path in root.glob("step_*") if step_of(path) is not None]
    return sorted(found, key=lambda path: -step_of(path))


def begin(root: Path, step: int) -> Path:
    """Make a folder to fill with the checkpoint of `step`. Raises FileExistsError if the checkpoint exists already."""
    final = root / f"step_{step}"
    if final.exists():
        raise FileExistsError(f"{final} exists; nothing is overwritten")
    partial = root / f".{final.name}.partial-{os.getpid()}"
    for name in ("actor", "ranks"):
        (partial / name).mkdir(parents=True)
    return partial


def publish(partial: Path, meta: Mapping[str, Any], written: Mapping[str, Facts]) -> Path:
    """Make a filled folder the newest checkpoint. Return its path.

    Args:
        written: the known facts about some of its files; other files are read for theirs.
    """
    step = int(meta["step"])
    names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
    files = {name: written.get(name) or facts_of(partial / name) for name in names}
    sync(partial)
    write_text(partial / META, sealed({**meta, "files": files}))
    sync_folder(partial)
    final = partial.with_name(f"step_{step}")
    partial.rename(final)
    sync_folder(final.parent)
    point(final)
    return final


def point(checkpoint: Path) -> None:
    """Make `latest` name `checkpoint`."""
    beside = checkpoint.with_name(f".latest-{os.getpid()}")
    beside.unlink(missing_ok=True)
    write_text(beside, f"{checkpoint.name}\n")
    beside.rename(checkpoint.with_name("latest"))
    sync_folder(checkpoint.parent)


def latest(root: Path) -> Path | None:
    """Return the checkpoint that `latest` names; None if there is no `latest` yet."""
    pointer = root / "latest"
    return root / pointer.read_text().strip() if pointer.is_file() else None


def retain(root: Path, newest: int, best: int, score: Callable[[Path], float | None]) -> None:
    """Remove all checkpoints but the `newest`, the `best` by `score`, and the one that `latest` names."""
    found = checkpoints_in(root)
    scores = {path: score(path) for path in found}
    ranked = sorted((path for path in found if scores[path] is not None), key=lambda path: -scores[path])
    kept = {latest(root), *found[:newest], *ranked[:best]}
    for path in found:
        if path not in kept:
            # Renamed first, because a folder that is half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.dropped-{os.getpid()}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the contents of state.json. Raises ConfigError if they cannot be read."""
    path = folder / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def tidy(root: Path, newest: Path) -> list[Path]:
    """Prepare `root` for a run that resumes from `newest`: remove unfinished folders, rename later checkpoints.

    Later checkpoints did not pass the check. Nothing in them is removed. Returns their new paths.
    """
    for left in [*root.glob(".step_*.partial-*"), *root.glob(".step_*.dropped-*")]:
        shutil.rmtree(left)
    for left in root.glob(".latest-*"):
        left.unlink()
    aside = []
    for path in checkpoints_in(root):
        if step_of(path) > step_of(newest):
            number = 1
            while (new := path.with_name(f"{path.name}.damaged-{number}")).exists():
                number += 1
            aside.append(path.rename(new))
    point(newest)
    return aside
