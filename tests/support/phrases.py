"""phrases: the drafts are one continuation, as long as allowed, from what the engine has generated before."""

from __future__ import annotations

from typing import Any

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms.algorithm import Algorithm


def check(speculation: SpeculationConfig) -> None:
    if speculation.topk != 1:
        raise ConfigError(
            f"speculation.algorithm=phrases drafts one branch: set speculation.topk=1, not {speculation.topk}"
        )


def depth(speculation: SpeculationConfig) -> int:
    return speculation.draft_tokens - 1


def server_arguments(speculation: SpeculationConfig) -> dict[str, Any]:
    length = speculation.draft_tokens - 1
    return {
        "speculative_algorithm": "NGRAM",
        "speculative_ngram_max_bfs_breadth": 1,
        "speculative_ngram_max_trie_depth": 2 * length,
    }


ALGORITHM = Algorithm(
    name="phrases",
    check=check,
    depth=depth,
    server_arguments=server_arguments,
    audit_shape={"topk": 1, "draft_tokens": 9},
)
