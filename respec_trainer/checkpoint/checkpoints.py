"""Checkpoints: when a run saves itself, what of it, and how it is taken up again.

Saving has two parts. Everything that the next step may change is copied into host memory, and only this makes training
wait; threads then write the copies (`writer`), and rank 0 publishes the folder (`store`). What a checkpoint holds is
told in docs/checkpoints.md.
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

LOGS = ("metrics.jsonl", "samples.jsonl")  # one line a step, or several; cut back to the checkpoint on resuming
PACKAGES = ("respec_trainer", "torch", "deepspeed", "megatron-core", "transformers", "sglang")


class Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class ActorPart(Protocol):
    """As much of `actor.engine.Actor` as is needed."""

    topology: Any
    hf_config: Any

    def save_state(self) -> SavedActor: ...

    def load_state(self, read: Callable, counts: Mapping[str, int]) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a run is made of, as seen from this rank.

    Args:
        shared: parts that are alike on all ranks, of states that are JSON; rank 0's are saved.
        ranks: parts of which every rank has its own, of states that `tree` can save.
        folders: what else rank 0 keeps: name of a folder -> takes a copy of what belongs in it, and returns a function
            that makes that folder, in a thread.
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
    """The checkpoints of the run in `folder`. Every rank calls every method but `due` alike.

    Args:
        control: a gloo group of all ranks; None: this is the only one. notify: tells the user; heard from rank 0.
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
        """Whether to save after `done` steps."""
        every = self.settings.every
        return every > 0 and (done % every == 0 or done == self.config.run.steps)

    def save(self, done: int, parts: Parts, metrics: Mapping[str, Any]) -> None:
        """Save the run as it is after `done` steps, the last of which gave `metrics` and is in metrics.jsonl.

        Waits for the checkpoint before, if that is still being written, and raises CheckpointError if it failed.
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
        place = self._from_first(lambda: begin(self.root, done))
        self.writer.start(SaveTask(done, place, files, folders, partial(self._publish, place, self._meta(done, actor))))
        if not self.settings.background:
            self.writer.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises CheckpointError if it could not be written."""
        self.writer.wait()

    def resume(self, parts: Parts) -> int | None:
        """Take the place of the checkpoint that checkpoint.resume asks for; the steps done by then. None: a new run.

        Raises ConfigError where none of those found is valid, or the one chosen is of another model or configuration.
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
        self._from_first(lambda: self._take_up(checkpoint))
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

    def _publish(self, place: Path, meta: Mapping[str, Any], written: Mapping) -> None:
        publish(place, meta, written)
        retain(self.root, self.settings.keep, self.settings.keep_best, self._score)

    def _score(self, checkpoint: Path) -> float | None:
        """The best_metric of its step; None where it has none."""
        try:
            value = read_state(checkpoint)["metrics"].get(self.settings.best_metric)
        except ConfigError:
            return None  # damaged since: it cannot be resumed from, so it is not among the best
        return value if isinstance(value, int | float) and value == value else None

    def _examine(self, checkpoint: Path) -> tuple[dict[str, Any], str | None]:
        """Its meta.json, and what is wrong with it; each rank reads some of its files."""
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
                    raise ConfigError(f"{checkpoint} was saved by a run without {name}: it cannot go on with one")
                part.load_state_dict(states[name])

    def _take_up(self, checkpoint: Path) -> None:
        """On rank 0: logs and folder become what they were when the checkpoint was published."""
        source = checkpoint.parent.parent
        same = source.resolve() == self.folder.resolve()
        missing = restore_logs(self.folder, self.folder if same else source, read_state(checkpoint)["logs"])
        if missing:
            self.notify(f"{source} holds no {', '.join(missing)}: those of this run begin after the checkpoint")
        if same:
            for aside in tidy(self.root, checkpoint):
                self.notify(f"a later checkpoint that is not valid was moved to {aside}")

    def _other_layout(self, meta: Mapping[str, Any], actor: ActorPart) -> str:
        saved, here = (meta["tp"], meta["dp"]), (actor.topology.tp, actor.topology.dp)
        if saved == here:
            return ""
        said = ", saved at tp {} x dp {}, at tp {} x dp {}".format(*saved, *here)
        if saved[0] * saved[1] != here[0] * here[1]:
            said += "; what each rank had of its own, such as its replay buffer, is that of rank (number mod saved)"
        return said

    def _from_first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank; or its error, an OSError as a CheckpointError."""

        def attempt() -> Any:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(f"{error.filename or self.root}: {error.strerror or error}") from error

        return from_first(attempt, self.control)


def _write_state(path: Path, text: str, logs: list[Path]):
    """Beside, the logs that state.json tells the lengths of are brought to the disk."""
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
