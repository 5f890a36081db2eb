"""Whether a run can go on from a checkpoint, and which run that is."""

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

# Keys, and sections, that a run may go on with other values of: where and how it is computed, not what. Data and model
# are compared by their content, not by where they lie.
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
# Of config.json: what says how a folder was written, not what the model is.
MODEL_MAY_DIFFER = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"}


def run_to_continue(config: Config) -> Path | None:
    """The folder of the run to go on with under checkpoint.resume=auto: the newest of its name with checkpoints.

    None: there is none, it has done run.steps steps already, or a new run is asked for.
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
    """The checkpoints to try, in this order, in the run's folder `run`; [] for a new run.

    Raises ConfigError where checkpoint.resume names a folder that holds none.
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
    """Raise ConfigError unless the run of `config`, with the model of config.json `model`, can go on from there."""
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
    """Let the logs in `run` end where they ended when the checkpoint was saved, so that no step is in them twice.

    Args:
        source: the run that saved it; if it is another one, the beginning of its logs is copied.
        positions: their lengths in bytes, by file name.

    Returns the names of those that `source` has no longer. Raises ConfigError for one that has become shorter.
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
                f"{origin} holds {size} bytes, but {length} when the checkpoint was saved: steps are missing in it. "
                "Restore it, or go on in a new run: checkpoint.resume=FOLDER OF THE CHECKPOINT"
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
    """ "key saved -> current" of every key that differs, but for those ignored, or in ignored sections."""
    return "; ".join(
        f"{key} {saved.get(key)} -> {current.get(key)}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not any(key == other or key.startswith(f"{other}.") for other in ignored)
    )
