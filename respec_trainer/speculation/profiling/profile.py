"""Profile: measured times of the parts of decoding and speculation, with the identity of the machine and the models.

This file defines the data and reads and writes its file; `measure.py` measures it with an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from respec_trainer.config import DType, PositiveFloat, PositiveInt, Section
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.cost import Part
from respec_trainer.speculation.shape import OFF, Shape

# plain: a decode step of the target. draft: all draft steps of a cycle. verify: the target's pass over the drafts.
# extend: the drafter's pass over the kept tokens; without speculation, over one token a sequence, which keeps the
# drafter's KV cache complete. catch_up: the drafter's pass over the whole context when speculation starts again;
# resume: its pass over the last token only, when speculation starts again after one plain step. prefill: reading the
# prompts with both models. switch: changing the engine's state to another number of draft steps. cycle: a whole
# speculative cycle, with the time between its parts.
WITHOUT = ("plain", "extend", "catch_up", "resume", "prefill", "switch")
WITHIN = ("draft", "verify", "extend", "cycle")
CYCLE = ("draft", "verify", "extend")

# The entries of a model's config that decide the time of a pass; names, paths and token ids do not.
COST_KEYS = (
    *("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "draft_vocab_size"),
    *("head_dim", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def shapes_digest(hf_config: Mapping[str, Any]) -> str:
    """Return a digest of the entries of a Hugging Face config that decide the cost of a pass: 16 hexadecimal digits."""
    entries = {key: hf_config[key] for key in COST_KEYS if hf_config.get(key) is not None}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


class Identity(Section):
    """The machine, software and models that a profile is valid for. With any difference its times do not apply."""

    versions: dict[str, str]  # of sglang, torch and respec_trainer
    device: str  # name of the GPU or CPU
    threads: PositiveInt  # of each engine process
    model: str  # digest of the target's shapes
    drafter: str  # digest of the drafter's shapes
    dtype: DType
    tp: PositiveInt


class Timing(Section):
    """Repeated measurements of one thing, in seconds."""

    seconds: Annotated[list[PositiveFloat], Field(min_length=1)]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles relative to the median; 0 for fewer than two repeats."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


class Cell(Section):
    """Times at one batch size (sequences), context length (tokens a sequence has so far) and shape."""

    batch: PositiveInt
    context: PositiveInt
    shape: Shape
    times: dict[Part, Timing]

    @model_validator(mode="after")
    def _parts_are_of_the_shape(self) -> Cell:
        if fault := self.shape.fault():
            raise ValueError(f"shape: {fault}")
        allowed = WITHIN if self.shape.steps else WITHOUT
        if wrong := sorted(set(self.times) - set(allowed)):
            raise ValueError(f"times: steps={self.shape.steps} has no part {wrong[0]!r}, only {', '.join(allowed)}")
        if not self.times:
            raise ValueError("times: none are given")
        missing = [part for part in CYCLE if part not in self.times] if self.shape.steps else []
        if missing and set(self.times) != {"cycle"}:
            raise ValueError(f"times: {', '.join(missing)} required, but not given")
        return self

    @property
    def decodes(self) -> bool:
        """True if the cell has times of decoding, not only of reading prompts."""
        return bool(self.shape.steps) or "plain" in self.times

    @property
    def seconds(self) -> float:
        """Time of one decode step or speculative cycle: as measured, or the sum of its parts."""
        return sum(timing.median for timing in self._whole)

    @property
    def repeats(self) -> list[float]:
        """`seconds` of each repeat. All cells of one batch size and context were measured in turns within a repeat."""
        return [sum(each) for each in zip(*(timing.seconds for timing in self._whole), strict=False)]

    @property
    def _whole(self) -> list[Timing]:
        parts = ("plain",) if self.shape == OFF else ("cycle",) if "cycle" in self.times else CYCLE
        return [self.times[part] for part in parts]


class Profile(Section):
    """Measured cells, at most one for each batch size, context length and shape.

    `graph_sizes`: the batch sizes of the CUDA graphs of the engine that was measured. A profile that does not name them
    is read as of an engine without graphs: its batches count with their own sizes.
    """

    identity: Identity
    graph_sizes: list[PositiveInt] = []
    cells: list[Cell]

    @model_validator(mode="after")
    def _one_cell_a_place(self) -> Profile:
        if sorted(set(self.graph_sizes)) != self.graph_sizes:
            raise ValueError(f"graph_sizes: {self.graph_sizes} must rise")
        seen = set()
        for index, cell in enumerate(self.cells):
            place = (cell.batch, cell.context, cell.shape)
            if place in seen:
                raise ValueError(
                    f"cells.{index}: batch={cell.batch}, context={cell.context}, shape={cell.shape} is there twice"
                )
            seen.add(place)
        return self

    def cell(self, batch: int, context: int, shape: Shape) -> Cell | None:
        wanted = (batch, context, shape)
        return next((cell for cell in self.cells if (cell.batch, cell.context, cell.shape) == wanted), None)

    def shapes(self) -> list[Shape]:
        """Return the measured shapes, without plain decoding."""
        return sorted({cell.shape for cell in self.cells} - {OFF})

    def check_fits(self, run: Identity, source: str = "the profile") -> None:
        """Raise ConfigError if the profile's identity differs from the run's, naming each field that differs."""
        ours, theirs = _flat(run), _flat(self.identity)
        wrong = [
            f"  {key}: measured with {theirs.get(key)!r}, the run has {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if wrong:
            raise ConfigError("\n".join([f"{source} does not fit this run; measure it again:", *wrong]))

    def save(self, path: str | Path) -> None:
        """Write the profile to a file in one atomic step."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.model_dump_json(indent=1))
        temporary.replace(path)


def load_profile(path: str | Path) -> Profile:
    """Read a profile. Raises ConfigError if the file is missing or malformed, naming the field."""
    return load_json(path, Profile, "profile")


def load_json(path: str | Path, kind: type[Section], name: str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no {name} at {path}")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path} is not a {name}:", *explain(error)])) from error


def explain(error: ValidationError) -> list[str]:
    """Return a line for each error: the field and the message."""
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        lines.append("  " + ": ".join(filter(None, [".".join(map(str, item["loc"])), message])))
    return lines


def _flat(identity: Identity) -> dict[str, Any]:
    fields = identity.model_dump()
    versions = fields.pop("versions")
    return fields | {f"versions.{name}": version for name, version in versions.items()}
