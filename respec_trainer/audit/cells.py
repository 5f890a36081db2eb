"""What an audit goes through: ways to run the engine, and ways to sample with each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from respec_trainer.config import SpeculationConfig

Before = Literal["nothing", "resync", "sleep"]


@dataclass(frozen=True)
class Mode:
    """One way to run the engine; its cells share one start. Speculation keys override the configuration's."""

    name: str
    speculation: dict[str, Any] = field(default_factory=dict)
    needs: Literal["nothing", "drafter"] = "nothing"  # what the configuration must have for it
    switching: bool = False  # speculation goes on and off with the size of the batch
    text: bool = False  # with the tokenizer, for stop strings
    wide: bool = False  # with a drafter of the whole vocabulary


@dataclass(frozen=True)
class Cell:
    """One law to test: `sampling` overrides SamplingParams; `before` says what the engine lives through first."""

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
MODES = {
    mode.name: mode
    for mode in (
        Mode("no speculation", {"algorithm": "none"}),
        Mode("EAGLE-3 chain", CHAIN, needs="drafter"),
        Mode("EAGLE-3 chain with text", CHAIN, needs="drafter", text=True),
        Mode("EAGLE-3 tree", TREE, needs="drafter"),
        Mode("EAGLE-3 rejection", CHAIN | {"rejection_sampling": True}, needs="drafter", wide=True),
        Mode("EAGLE-3 on and off", CHAIN, needs="drafter", switching=True),
        Mode("standalone", {"algorithm": "standalone", "steps": 3, "topk": 1, "draft_tokens": 4}),
        Mode("ngram", {"algorithm": "ngram"}),
    )
}
CONTROL = Mode("lossy on purpose", CHAIN | {"accept_threshold_acc": 0.9, "allow_lossy": True}, needs="drafter")

TEMPERATURES = tuple({"temperature": temperature} for temperature in (1.0, 0.6, 0.3))
FILTERS = ({"top_p": 0.9}, {"top_k": 20})
CELLS = (
    *(Cell("no speculation", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    *(Cell("EAGLE-3 tree", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    Cell("EAGLE-3 on and off", ends=True),  # the batch shrinks as limits are met, and grows again
    Cell("EAGLE-3 rejection"),
    Cell("standalone"),
    Cell("ngram"),
    Cell("EAGLE-3 chain with text", ends=True),
    # The last ones, because they change the actor.
    *(Cell("EAGLE-3 chain", sampling) for sampling in (*TEMPERATURES, *FILTERS)),
    Cell("EAGLE-3 chain", before="resync"),
    Cell("EAGLE-3 chain", before="sleep"),
)
SHORT = (Cell("no speculation"), Cell("EAGLE-3 chain"), Cell("EAGLE-3 chain", before="resync"))


def speculation_of(mode: Mode, base: SpeculationConfig) -> SpeculationConfig:
    """The mode's speculation, with the configuration's thresholds: if those are lossy, the audit must show it."""
    return SpeculationConfig(**(base.model_dump() | {"rejection_sampling": False} | mode.speculation))
