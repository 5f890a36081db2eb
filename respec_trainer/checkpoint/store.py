"""The folder checkpoints/ of a run: publishing, finding, checking and dropping of checkpoints.

A checkpoint is filled as .step_N.partial-PID, brought to the disk, and renamed to step_N; then the pointer `latest` is
replaced by a rename too. So whenever a process, or the machine, dies: what is named step_N was complete, and `latest`
names one of them. Everything else begins with a dot, and is removed when the run is taken up again.
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
    """The N of step_N; None for any other name."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else None


def checkpoints_in(root: Path) -> list[Path]:
    """The folders step_N in `root`, whether valid or not, the newest first; [] where there is no `root`."""
    found = [path for path in root.glob("step_*") if step_of(path) is not None]
    return sorted(found, key=lambda path: -step_of(path))


def begin(root: Path, step: int) -> Path:
    """A new folder to fill with the checkpoint of `step`. Raises FileExistsError where that exists already."""
    final = root / f"step_{step}"
    if final.exists():
        raise FileExistsError(f"{final} exists; nothing is overwritten")
    partial = root / f".{final.name}.partial-{os.getpid()}"
    for name in ("actor", "ranks"):
        (partial / name).mkdir(parents=True)
    return partial


def publish(partial: Path, meta: Mapping[str, Any], written: Mapping[str, Facts]) -> Path:
    """Make a filled folder the newest checkpoint. Returns its place.

    Args:
        written: what is known of its files already; the others are read to know it.
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
    """Let `latest` name `checkpoint`."""
    beside = checkpoint.with_name(f".latest-{os.getpid()}")
    beside.unlink(missing_ok=True)
    write_text(beside, f"{checkpoint.name}\n")
    beside.rename(checkpoint.with_name("latest"))
    sync_folder(checkpoint.parent)


def latest(root: Path) -> Path | None:
    """What `latest` names; None where there is none yet."""
    pointer = root / "latest"
    return root / pointer.read_text().strip() if pointer.is_file() else None


def retain(root: Path, newest: int, best: int, score: Callable[[Path], float | None]) -> None:
    """Drop all checkpoints but the newest ones, the best ones by `score`, and the one that `latest` names."""
    found = checkpoints_in(root)
    scores = {path: score(path) for path in found}
    ranked = sorted((path for path in found if scores[path] is not None), key=lambda path: -scores[path])
    kept = {latest(root), *found[:newest], *ranked[:best]}
    for path in found:
        if path not in kept:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.dropped-{os.getpid()}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json. Raises ConfigError where they cannot be read."""
    path = folder / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def tidy(root: Path, newest: Path) -> list[Path]:
    """Before a run goes on from checkpoint `newest`: remove what was never completed, and move later ones aside.

    Those did not pass the check. Returns their new places; nothing is removed of them.
    """
    for left in [*root.glob(".step_*.partial-*"), *root.glob(".step_*.dropped-*")]:
        shutil.rmtree(left)
    for left in root.glob(".latest-*"):
        left.unlink()
    aside = []
    for path in checkpoints_in(root):
        if step_of(path) > step_of(newest):
            number = 1
            while (place := path.with_name(f"{path.name}.damaged-{number}")).exists():
                number += 1
            aside.append(path.rename(place))
    point(newest)
    return aside
