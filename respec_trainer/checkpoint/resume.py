"""Selects the checkpoint that a run resumes from, and checks that it fits the run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from respec_trainer.checkpoint.new_folder import sync_folder
from respec_trainer.checkpoint.store import checkpoints_in, step_of
from respec_trainer.config import Config
from respec_trainer.config_file import load_config
from respec_trainer.errors import ConfigError

# Keys, and sections, that may change when a run resumes: where and how it computes, not what. Data and model are
# compared by content, not by path.
MAY_DIFFER = (
    "run.name",
    "run.dir",
    "run.steps",
    "run.device",
    "run.max_bad_steps",
    "run.lost_after",
    "run.hang_timeout",
    "model.path",
    "data.path",
    "rollout.engine",
    "rollout.audit_every",
    "speculation.steps",
    "speculation.topk",
    "speculation.draft_tokens",
    "speculation.rejection_sampling",
    "speculation.policy",
    "speculation.profile",
    "speculation.candidates",
    "speculation.explore",
    "speculation.off",
    "drafter.path",
    "drafter.micro_batch_size",
    "drafter.memory_mb",
    "drafter.compare_frozen",
    "drafter.max_bad_updates",
    "actor.parallel",
    "actor.zero",
    "actor.micro_batch_size",
    "actor.recompute",
    "actor.logprob_chunk",
    "resync",
    "checkpoint",
    "telemetry",
)
# Keys of config.json that depend on how a folder was written, not on the model.
MODEL_MAY_DIFFER = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"}


def run_to_continue(config: Config) -> Path | None:
    """Return the run's folder to continue under checkpoint.resume=auto: the newest of its name with checkpoints.

    None if there is none, if it has done run.steps steps already, or if checkpoint.resume has another value.
    """
    if config.checkpoint.resume != "auto":
        return None
    found = {}
    for path in Path(config.run.dir).glob(f"{config.run.name}*"):
        match = re.fullmatch(re.escape(config.run.name) + r"(?:-(\d+))?", path.name)
        if match and checkpoints_in(path / "checkpoints"):
            found[int(match[1] or 1)] = path
    if not found:
        return None
    newest = found[max(found)]
    done = max(step_of(checkpoint) or 0 for checkpoint in checkpoints_in(newest / "checkpoints"))
    return newest if done < config.run.steps else None


def candidates(config: Config, run: Path) -> list[Path]:
    """Return the checkpoints to try, in this order, for the run in folder `run`; [] for a new run.

    Raises ConfigError if checkpoint.resume names a folder without checkpoints.
    """
    wanted = config.checkpoint.resume
    if wanted == "never":
        return []
    if wanted == "auto":
        return checkpoints_in(run / "checkpoints")
    path = Path(wanted).absolute()
    found = [path] if step_of(path) is not None and path.is_dir() else checkpoints_in(path / "checkpoints")
    if not found:
        raise ConfigError(
            f"checkpoint.resume={wanted} holds no checkpoint: give the folder of a run, or one of its "
            "checkpoints/step_N; or auto, or never"
        )
    return found


def _saved_config(checkpoint: Path) -> Config:
    """The configuration of the run that saved the checkpoint. Raises ConfigError if another version saved it."""
    try:
        return load_config(checkpoint / "config.yaml")
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint} was saved by another version of respec_trainer, whose configuration this one does not read; "
            "finish that run with the version that began it, or start a new one with checkpoint.resume=never. The "
            f"configuration: {error}"
        ) from error


def check_compatible(checkpoint: Path, meta: Mapping[str, Any], config: Config, model: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run of `config` can resume from `checkpoint`; `model` is its model's config.json."""
    if not meta["optimizer"]:
        raise ConfigError(
            f"{checkpoint} holds no optimizer: it is a converted model. Convert it to a Hugging Face folder and start "
            "a run with that as model.path"
        )
    differing = _differences(meta["model"], model, MODEL_MAY_DIFFER)
    if differing:
        raise ConfigError(f"{checkpoint} is of another model than model.path={config.model.path}: {differing}")
    saved = _flat(_saved_config(checkpoint).model_dump())
    differing = _differences(saved, _flat(config.model_dump()), MAY_DIFFER)
    if differing:
        raise ConfigError(
            f"{checkpoint} was saved by a run with another configuration: {differing}. Set these as they were to go "
            "on, or start a new run: checkpoint.resume=never"
        )


def restore_logs(run: Path, source: Path, positions: Mapping[str, int]) -> list[str]:
    """Cut the logs in `run` to their lengths when the checkpoint was saved, so that no step is in them twice.

    Args:
        source: the run that saved the checkpoint; if it is another run, its logs are copied first.
        positions: the lengths in bytes, by file name.

    Returns the names of logs that `source` does not have any more. Raises ConfigError for a log that is too short.
    """
    missing = []
    for name, length in positions.items():
        origin, log = source / name, run / name
        if not origin.is_file() and source != run:
            missing.append(name)
            continue
        size = origin.stat().st_size if origin.is_file() else 0
        if size < length:
            raise ConfigError(
                f"{origin} holds {size} bytes, but held {length} when the checkpoint was saved: it lacks some steps. "
                "Restore it, or continue in a new run: checkpoint.resume=FOLDER OF THE CHECKPOINT"
            )
        if source != run:
            shutil.copyfile(origin, log)
        if length or log.exists():
            os.truncate(log, length)
            sync_folder(log)
    return missing


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], ignored) -> str:
    """Return "key saved -> current" for every key that differs, except ignored keys and sections."""
    return "; ".join(
        f"{key} {saved.get(key)} -> {current.get(key)}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not any(key == other or key.startswith(f"{other}.") for other in ignored)
    )
