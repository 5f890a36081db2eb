"""Functions shared by the algorithms whose drafter is a network: `steps` passes, each with `topk` tokens per branch."""

from __future__ import annotations

from typing import Any

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError


def check(speculation: SpeculationConfig) -> None:
    """Raise ConfigError unless draft_tokens is steps + 1 for a chain, or more than steps and within the tree's size."""
    s, t, n = speculation.steps, speculation.topk, speculation.draft_tokens
    if t == 1 and n != s + 1:
        raise ConfigError(
            f"speculation: a chain (topk=1) verifies exactly steps + 1 tokens: set draft_tokens={s + 1}, not {n}"
        )
    limit = 1 + drafted_tokens(s, t)
    if t > 1 and not s < n <= limit:
        raise ConfigError(f"speculation: a tree of steps={s}, topk={t} needs {s} < draft_tokens <= {limit}, not {n}")


def drafted_tokens(steps: int, topk: int) -> int:
    """Return the drafted tokens of a tree: each step after the first adds topk tokens to each of topk branches."""
    return topk + (steps - 1) * topk**2


def depth(speculation: SpeculationConfig) -> int:
    return speculation.steps


def server_arguments(speculation: SpeculationConfig) -> dict[str, Any]:
    return {"speculative_num_steps": speculation.steps, "speculative_eagle_topk": speculation.topk}
