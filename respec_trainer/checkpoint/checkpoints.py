"""Checkpoints: when a run is saved, which state is saved, and how a run resumes.

A save has two parts. First all state that the next step may change is copied into host memory; training waits only for
this. Then threads write the copies (`writer`), and rank 0 publishes the folder (`store`). docs/checkpoints.md describes
the contents of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from respec_trainer.checkpoint.files import write_tensors, write_text
from respec_trainer.checkpoint.fragments import SavedActor, file_name
from respec_trainer.checkpoint.meta import check_files, read_meta
from respec_trainer.checkpoint.new_folder import carry_over, sync_folder
from respec_trainer.checkpoint.reader import FragmentReader
from respec_trainer.checkpoint.resume import candidates, check_compatible, restore_logs
from respec_trainer.checkpoint.rng import RandomStates
from respec_trainer.checkpoint.store import begin, publish, read_state, retain, tidy
from respec_trainer.checkpoint.tree import copy_tree, load_tree, save_tree
from respec_trainer.checkpoint.writer import SaveTask, Writer
from respec_trainer.collectives import from_first, gather
from respec_trainer.config import Config
from respec_trainer.config_file import dump_config
from respec_trainer.errors import CheckpointError, ConfigError

LOGS = ("metrics.jsonl", "samples.jsonl")  # one or more lines for each step; on resume cut back to the checkpoint
PACKAGES = ("respec_trainer", "torch", "deepspeed", "megatron-core", "transformers", "sglang")


class Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class ActorPart(Protocol):
    """The part of `actor.engine.Actor` that is used here."""

    topology: Any
    hf_config: Any

    def save_state(self) -> SavedActor: ...

    def load_state(self, read: Callable, counts: Mapping[str, int]) -> None: ...


@dataclass(frozen=True)
class Parts:
    """The parts of a run on this rank that a checkpoint holds.

    Args:
        shared: parts that are equal on all ranks, with states that are JSON; those of rank 0 are saved.
        ranks: parts that differ between ranks, with states that `tree` can save.
        folders: folders of rank 0, by name. The function copies the data of the folder at once, and returns a function
            that writes the folder later, in a thread.
        immutable: paths of tensors in `ranks` that never change, such as "learner/buffer": they are not copied.
    """

    actor: ActorPart
    shared: Mapping[str, Stateful] = field(default_factory=dict)
    ranks: Mapping[str, Stateful] = field(default_factory=dict)
    folders: Mapping[str, Callable[[], Callable[[Path], None]]] = field(default_factory=dict)
    immutable: tuple[str, ...] = ()

    def of_ranks(self) -> dict[str, Stateful]:
        return {"rng": RandomStates(), **self.ranks}


class Checkpoints:
    """The checkpoints of the run in `folder`. Every rank calls every method, except `due`, in the same order.

    Args:
        control: a gloo group of all ranks; None: this is the only rank.
        notify: informs the user; only rank 0's messages are shown.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        rank: int,
        world_size: int,
        control: dist.ProcessGroup | None,
        notify: Callable[[str], None],
    ):
        self.config, self.settings, self.folder = config, config.checkpoint, Path(folder)
        self.root = self.folder / "checkpoints"
        self.rank, self.world_size, self.control, self.notify = rank, world_size, control, notify
        self.writer = Writer(rank, world_size, notify)

    def due(self, done: int) -> bool:
        """Return whether to save after `done` steps."""
        every = self.settings.every
        return every > 0 and (done % every == 0 or done == self.config.run.steps)

    def save(self, done: int, parts: Parts, metrics: Mapping[str, Any]) -> None:
        """Save the run after `done` steps. `metrics` are those of the last step, which is in metrics.jsonl already.

        Waits for the previous checkpoint if that is still being written, and raises CheckpointError if it failed.
        """
        self.writer.wait()
        actor = parts.actor.save_state()
        states = {name: part.state_dict() for name, part in parts.of_ranks().items()}
        mine = copy_tree(states, parts.immutable)
        files = {
            file_name(actor.tp_rank, actor.dp_rank): partial(write_tensors, tensors=actor.fragments),
            f"ranks/rank{self.rank}.safetensors": partial(save_tree, tree=mine),
        }
        folders: dict[str, Callable[[Path], None]] = {}
        if self.rank == 0:
            files |= self._common_files(done, parts, actor, metrics)
            folders = {name: take() for name, take in parts.folders.items()}
            folders["hf"] = partial(carry_over, Path(self.config.model.path))
        path = self._from_first(lambda: begin(self.root, done))
        self.writer.start(SaveTask(done, path, files, folders, partial(self._publish, path, self._meta(done, actor))))
        if not self.settings.background:
            self.writer.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk. Raises CheckpointError if it could not be written."""
        self.writer.wait()

    def resume(self, parts: Parts) -> int | None:
        """Load the checkpoint that checkpoint.resume selects. Return its number of steps; None for a new run.

        Raises ConfigError if no checkpoint found is valid, or the chosen one has another model or configuration.
        """
        tried = self._from_first(lambda: candidates(self.config, self.folder))
        problems: list[str] = []
        for checkpoint in tried:
            meta, problem = self._examine(checkpoint)
            if problem is None:
                break
            problems.append(problem)
            self.notify(f"{checkpoint.name} is skipped: {problem}")
        else:
            if tried:
                raise ConfigError(
                    f"no checkpoint in {tried[0].parent} is valid: {'; '.join(problems)}. Restore one, or start a new "
                    "run: checkpoint.resume=never"
                )
            return None
        check_compatible(checkpoint, meta, self.config, self._model())
        self._load(checkpoint, meta, parts)
        self._from_first(lambda: self._restore_folder(checkpoint))
        self.notify(f"resumed after step {meta['step']} from {checkpoint}{self._other_layout(meta, parts.actor)}")
        return meta["step"]

    def _common_files(self, done: int, parts: Parts, actor: SavedActor, metrics: Mapping[str, Any]) -> dict:
        logs = {name: self.folder / name for name in LOGS if (self.folder / name).is_file()}
        state = {
            "step": done,
            "actor": actor.counts,
            "shared": {name: part.state_dict() for name, part in parts.shared.items()},
            "logs": {name: path.stat().st_size for name, path in logs.items()},
            "metrics": dict(metrics),
        }
        text = json.dumps(state, indent=1)
        return {
            "state.json": partial(_write_state, text=text, logs=list(logs.values())),
            "config.yaml": partial(write_text, text=dump_config(self.config)),
        }

    def _meta(self, done: int, actor: SavedActor) -> dict[str, Any]:
        return {"step": done, **actor.layout, "model": self._model(), "versions": _versions()}

    def _model(self) -> dict[str, Any]:
        return json.loads((Path(self.config.model.path) / "config.json").read_text())

    def _publish(self, path: Path, meta: Mapping[str, Any], written: Mapping) -> None:
        publish(path, meta, written)
        retain(self.root, self.settings.keep, self.settings.keep_best, self._score)

    def _score(self, checkpoint: Path) -> float | None:
        """Return the best_metric of the checkpoint's step; None if the step has none."""
        try:
            value = read_state(checkpoint)["metrics"].get(self.settings.best_metric)
        except ConfigError:
            return None  # damaged: no run can resume from it, so it is not among the best
        return value if isinstance(value, int | float) and value == value else None

    def _examine(self, checkpoint: Path) -> tuple[dict[str, Any], str | None]:
        """Return the meta.json of a checkpoint, and its first problem or None. Each rank reads some of the files."""
        try:
            meta = self._from_first(lambda: read_meta(checkpoint))
        except ConfigError as error:
            return {}, str(error)
        share = sorted(meta["files"])[self.rank :: self.world_size]
        problems = gather(check_files(checkpoint, meta["files"], share), self.control)
        return meta, next(filter(None, problems), None)

    def _load(self, checkpoint: Path, meta: Mapping[str, Any], parts: Parts) -> None:
        state, topology = read_state(checkpoint), parts.actor.topology
        reader = FragmentReader(checkpoint, meta, parts.actor.hf_config, topology.tp_rank, topology.tp)
        parts.actor.load_state(reader.read, state["actor"])
        # With more ranks than were saved, some begin with the same state.
        saved_rank = self.rank % (meta["tp"] * meta["dp"])
        own = load_tree(checkpoint / f"ranks/rank{saved_rank}.safetensors")
        for states, loaded in ((state["shared"], parts.shared), (own, parts.of_ranks())):
            for name, part in loaded.items():
                if name not in states:
                    raise ConfigError(
                        f"{checkpoint} was saved by a run without {name}: a run with one cannot resume from it"
                    )
                part.load_state_dict(states[name])

    def _restore_folder(self, checkpoint: Path) -> None:
        """Restore the logs and the folder to their state when the checkpoint was published; on rank 0."""
        source = checkpoint.parent.parent
        same = source.resolve() == self.folder.resolve()
        missing = restore_logs(self.folder, self.folder if same else source, read_state(checkpoint)["logs"])
        if missing:
            self.notify(f"{source} holds no {', '.join(missing)}: this run's begin after the checkpoint")
        if same:
            for aside in tidy(self.root, checkpoint):
                self.notify(f"a later checkpoint that is not valid was moved to {aside}")

    def _other_layout(self, meta: Mapping[str, Any], actor: ActorPart) -> str:
        saved, current = (meta["tp"], meta["dp"]), (actor.topology.tp, actor.topology.dp)
        if saved == current:
            return ""
        text = ", saved at tp {} x dp {}, at tp {} x dp {}".format(*saved, *current)
        if saved[0] * saved[1] != current[0] * current[1]:
            text += "; the state of single ranks, such as the replay buffer, is that of rank (number mod saved)"
        return text

    def _from_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0. Return its result or raise its error on every rank; an OSError as CheckpointError."""

        def attempt() -> Any:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(f"{error.filename or self.root}: {error.strerror or error}") from error

        return from_first(attempt, self.control)


def _write_state(path: Path, text: str, logs: list[Path]):
    """Write state.json. Before that, sync the logs to the disk, because state.json holds their lengths."""
    for log in logs:
        sync_folder(log)
    return write_text(path, text)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
