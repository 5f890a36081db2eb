"""Shape: one configuration of speculation, (s, t, n)."""

from __future__ import annotations

from typing import NamedTuple

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms.trees import drafted_tokens


class Shape(NamedTuple):
    """One shape: `steps` draft steps a cycle (0: no speculation), `topk` branches a step, `draft_tokens` verified.

    `draft_tokens` includes the root.
    """

    steps: int
    topk: int
    draft_tokens: int

    def __str__(self) -> str:
        return ",".join(map(str, self)) if self.steps else "off"

    @property
    def is_chain(self) -> bool:
        """True for one branch whose drafts are all verified: the engine can switch between chains while it runs."""
        return self.topk == 1 and self.draft_tokens == self.steps + 1

    def fault(self) -> str | None:
        """Return why the shape is impossible; None if it is possible."""
        steps, topk, draft_tokens = self
        if steps == 0:
            return None if self == OFF else f"steps=0 is plain decoding, which is {tuple(OFF)}, not {tuple(self)}"
        if steps < 0 or topk < 1 or draft_tokens < 2:
            return f"{tuple(self)} needs steps >= 0, topk >= 1 and draft_tokens >= 2"
        drafted = drafted_tokens(steps, topk)
        if draft_tokens > 1 + drafted:
            return f"{tuple(self)} drafts only {drafted} tokens, and cannot verify {draft_tokens - 1} of them"
        return None


OFF = Shape(0, 1, 1)


def chain(steps: int) -> Shape:
    """Return the shape of one branch, all of it verified; OFF for 0."""
    return Shape(steps, 1, steps + 1)


def parse_shape(text: str) -> Shape:
    """Parse text such as "3,2,6". Raises ConfigError if it is not a possible shape."""
    try:
        shape = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{text!r} is not steps,topk,draft_tokens, such as 3,2,6") from error
    if fault := shape.fault():
        raise ConfigError(f"{text}: {fault}")
    return shape
