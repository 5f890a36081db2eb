"""eagle3: a drafter of one layer that reads the target's hidden states and can be trained during the run."""

from __future__ import annotations

from typing import Any

from respec_trainer.config import SpeculationConfig
from respec_trainer.speculation.algorithms import trees
from respec_trainer.speculation.algorithms.algorithm import Algorithm, DrafterFolder


def server_arguments(speculation: SpeculationConfig) -> dict[str, Any]:
    return {"speculative_algorithm": "EAGLE3"} | trees.server_arguments(speculation)


ALGORITHM = Algorithm(
    name="eagle3",
    check=trees.check,
    depth=trees.depth,
    server_arguments=server_arguments,
    truncates=True,
    folder=DrafterFolder.EAGLE3,
    samples=True,
    adapts=True,
    learns=True,
    pushes=True,
    exports=True,
)
