"""The cells of an audit: modes of the engine, and sampling parameters for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from respec_trainer.config import SpeculationConfig
from respec_trainer.speculation.algorithms import ALGORITHMS, DrafterFolder

Before = Literal["nothing", "resync", "sleep"]


@dataclass(frozen=True)
class Mode:
    """One way to run the engine. `speculation` overrides keys of the configuration's section."""

    name: str
    speculation: dict[str, Any] = field(default_factory=dict)
    needs: Literal["nothing", "drafter"] = "nothing"  # requirement on the configuration
    switching: bool = False  # speculation turns on and off with the batch size
    text: bool = False  # the engine has the tokenizer, for stop strings
    wide: bool = False  # the drafter has the whole vocabulary


@dataclass(frozen=True)
class Cell:
    """One law to test: `sampling` overrides SamplingParams; `before` is an event of the engine before the test."""

    mode: str
    sampling: dict[str, Any] = field(default_factory=dict)
    before: Before = "nothing"
    ends: bool = False  # stop strings, stop tokens and limits of many lengths

    @property
    def name(self) -> str:
        shape = {"temperature": 1.0} | self.sampling
        words = [f"T={shape.pop('temperature')}", *(f"{key}={value}" for key, value in shape.items())]
        words += ["stops and limits"] if self.ends else []
        words += {"nothing": [], "resync": ["after a resync"], "sleep": ["after sleep and wake"]}[self.before]
        return f"{self.mode}, {', '.join(words)}"


CHAIN = {"algorithm": "eagle3", "steps": 3, "topk": 1, "draft_tokens": 4}
TREE = {"algorithm": "eagle3", "steps": 3, "topk": 2, "draft_tokens": 6}
# These algorithms have modes with names; every other algorithm has one mode and one cell, by its `audit_shape`.
NAMED = (
    Mode("no speculation", {"algorithm": "none"}),
    Mode("EAGLE-3 chain", CHAIN, needs="drafter"),
    Mode("EAGLE-3 chain with text", CHAIN, needs="drafter", text=True),
    Mode("EAGLE-3 tree", TREE, needs="drafter"),
    Mode("EAGLE-3 rejection", CHAIN | {"rejection_sampling": True}, needs="drafter", wide=True),
    Mode("EAGLE-3 on and off", CHAIN, needs="drafter", switching=True),
)
CONTROL = Mode("lossy on purpose", CHAIN | {"accept_threshold_acc": 0.7, "allow_lossy": True}, needs="drafter")

TEMPERATURES = tuple({"temperature": temperature} for temperature in (1.0, 0.6, 0.3))
FILTERS = ({"top_p": 0.9}, {"top_k": 4, "top_p": 0.95})  # four tokens, so that top_k changes what top_p keeps
FIRST = (
    *(Cell("no speculation", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    *(Cell("EAGLE-3 tree", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    Cell("EAGLE-3 on and off", ends=True),  # the batch shrinks as responses reach their limits, and grows again
    Cell("EAGLE-3 rejection"),
)
LAST = (
    Cell("EAGLE-3 chain with text", ends=True),
    *(Cell("EAGLE-3 chain", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    # These change the actor, so only cells of this kind may follow.
    Cell("EAGLE-3 chain", before="resync"),
    Cell("EAGLE-3 chain", before="sleep"),
)
SHORT = (Cell("no speculation"), Cell("EAGLE-3 chain"), Cell("EAGLE-3 chain", before="resync"))


def described_modes() -> list[Mode]:
    """Return a mode for each algorithm without one in NAMED; its name is the algorithm's."""
    named = {mode.speculation["algorithm"] for mode in NAMED}
    return [
        Mode(
            algorithm.name,
            {"algorithm": algorithm.name, **algorithm.audit_shape},
            needs="drafter" if algorithm.folder is DrafterFolder.EAGLE3 else "nothing",
        )
        for algorithm in (ALGORITHMS[name] for name in ALGORITHMS if name not in named)
    ]


def all_modes() -> dict[str, Mode]:
    return {mode.name: mode for mode in (*NAMED, *described_modes())}


def all_cells() -> tuple[Cell, ...]:
    return (*FIRST, *(Cell(mode.name) for mode in described_modes()), *LAST)


def speculation_of(mode: Mode, base: SpeculationConfig) -> SpeculationConfig:
    """Return the mode's speculation, with the configuration's thresholds: the audit must detect lossy ones."""
    fixed = {"rejection_sampling": False, "policy": "fixed", "profile": None, "candidates": None}
    return SpeculationConfig(**(base.model_dump() | fixed | mode.speculation))
