"""Shape: one configuration of speculation, (s, t, n)."""

from __future__ import annotations

from typing import NamedTuple

from respec_trainer.errors import ConfigError


class Shape(NamedTuple):
    """`steps` drafted a cycle (0: no speculation), `topk` branches a step, `draft_tokens` verified, root included."""

    steps: int
    topk: int
    draft_tokens: int

    def __str__(self) -> str:
        return ",".join(map(str, self)) if self.steps else "off"

    @property
    def is_chain(self) -> bool:
        """Whether the engine can take this shape, or leave it, while it runs."""
        return self.topk == 1 and self.draft_tokens == self.steps + 1

    def fault(self) -> str | None:
        """Why there is no such shape; None if there is."""
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


def drafted_tokens(steps: int, topk: int) -> int:
    """Tokens in a tree: each step but the first tries topk continuations of the topk best branches."""
    return topk + (steps - 1) * topk**2


def chain(steps: int) -> Shape:
    """One branch, all of it verified; no speculation for 0."""
    return Shape(steps, 1, steps + 1)


def parse_shape(text: str) -> Shape:
    """ "3,2,6" as a shape. Raises ConfigError if it is none."""
    try:
        shape = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{text!r} is not steps,topk,draft_tokens, such as 3,2,6") from error
    if fault := shape.fault():
        raise ConfigError(f"{text}: {fault}")
    return shape
