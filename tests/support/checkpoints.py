"""A run that is nearly nothing but its checkpoints, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from respec_trainer.checkpoint.checkpoints import Checkpoints, Parts
from respec_trainer.checkpoint.fragments import KINDS, SavedActor, fragment_key
from respec_trainer.config import Config
from tests.support.models import tiny_config, tiny_run_config

NAME, SIZE = "decoder.final_layernorm.weight", 64


class ToyActor:
    """One weight, replicated over tensor parallelism, that every step changes."""

    def __init__(self, hf_config, rank: int, ranks: int):
        self.hf_config = hf_config
        self.topology = SimpleNamespace(tp_rank=rank, tp=ranks, dp_rank=0, dp=1)
        self.values = {kind: torch.zeros(SIZE) for kind in KINDS}
        self.updates = 0

    def step(self) -> None:
        for number, value in enumerate(self.values.values(), 1):
            value += number * torch.rand(SIZE)
        self.updates += 1

    def save_state(self) -> SavedActor:
        layout = {
            "tp": self.topology.tp,
            "dp": 1,
            "zero": 1,
            "dtype": "fp32",
            "optimizer": True,
            "parameters": {NAME: [SIZE]},
        }
        fragments = {fragment_key(kind, NAME, 0): value.clone() for kind, value in self.values.items()}
        return SavedActor(self.topology.tp_rank, 0, layout, fragments, {"updates": self.updates})

    def load_state(self, read: Callable, counts) -> None:
        self.values = {kind: read(kind, NAME, (SIZE,), 0, SIZE) for kind in KINDS}
        self.updates = counts["updates"]


class Number:
    """Any part with a state."""

    def __init__(self):
        self.value = 0

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


class ToyRun:
    """`work` does some steps, after each of which it writes a line to metrics.jsonl and saves if that is due."""

    def __init__(self, folder: Path, config: Config, rank: int = 0, ranks: int = 1):
        """With several ranks, each of them makes one, and the default process group is theirs."""
        self.config, self.folder, self.rank, self.said = config, folder, rank, []
        self.actor, self.shared, self.own = ToyActor(tiny_config("llama"), rank, ranks), Number(), Number()
        self.parts = Parts(self.actor, {"shared": self.shared}, {"own": self.own}, {"drafter": self._drafter})
        folder.mkdir(exist_ok=True, parents=True)
        torch.manual_seed(0)
        self.checkpoints = Checkpoints(config, folder, rank, ranks, None, self.said.append)
        self.done = self.checkpoints.resume(self.parts) or 0

    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.actor.step()
            self.shared.value, self.own.value = 2 * self.done, 3 * self.done + self.rank
            self.done += 1
            metrics = {"reward/mean": float(self.actor.values["master"].sum())}
            if self.rank == 0:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.done, **metrics}) + "\n")
            if self.checkpoints.due(self.done):
                self.checkpoints.save(self.done, self.parts, metrics)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def _drafter(self) -> Callable[[Path], None]:
        text = f"as of update {self.actor.updates}"

        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text(text)

        return make


def damage(path: Path) -> None:
    """Flip the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def toy_config(folder: Path, changes: dict | None = None) -> Config:
    """Of a run in `folder` that saves after every step."""
    model = folder / "model"
    if not model.exists():
        tiny_config("llama").save_pretrained(model)
        (model / "tokenizer.json").write_text("{}")
        (model / "model.safetensors").write_text("weights are not carried along")
    base = {"run.dir": str(folder / "runs"), "run.steps": 100, "checkpoint.every": 1}
    return tiny_run_config(model, base | (changes or {}))
