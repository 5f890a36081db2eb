"""standalone: a smaller model of the target's family drafts. It is never trained and stays in its own folder."""

from __future__ import annotations

from typing import Any

from respec_trainer.config import SpeculationConfig
from respec_trainer.speculation.algorithms import trees
from respec_trainer.speculation.algorithms.algorithm import Algorithm, DrafterFolder


def server_arguments(speculation: SpeculationConfig) -> dict[str, Any]:
    return {"speculative_algorithm": "STANDALONE"} | trees.server_arguments(speculation)


ALGORITHM = Algorithm(
    name="standalone",
    check=trees.check,
    depth=trees.depth,
    server_arguments=server_arguments,
    audit_shape={"steps": 3, "topk": 1, "draft_tokens": 4},
    truncates=True,
    folder=DrafterFolder.MODEL,
)
