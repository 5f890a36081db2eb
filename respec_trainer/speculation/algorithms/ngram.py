"""ngram: the drafts are tokens that followed the last tokens in texts that the engine read or generated before."""

from __future__ import annotations

from typing import Any

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms.algorithm import Algorithm


def check(speculation: SpeculationConfig) -> None:
    """Raise ConfigError if draft_tokens leaves no room for a draft. The matches decide the tree's width and depth."""
    if speculation.draft_tokens < 2:
        raise ConfigError(
            f"speculation.algorithm={speculation.algorithm} needs draft_tokens >= 2, the root and at least one draft, "
            f"not {speculation.draft_tokens}"
        )


def depth(speculation: SpeculationConfig) -> int:
    return speculation.draft_tokens - 1


def server_arguments(speculation: SpeculationConfig) -> dict[str, Any]:
    return {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": speculation.topk}


ALGORITHM = Algorithm(name="ngram", check=check, depth=depth, server_arguments=server_arguments, truncates=True)
