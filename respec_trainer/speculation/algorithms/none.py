"""none: no speculation. It ignores the section's other keys, so that one key turns speculation off for comparison."""

from __future__ import annotations

from respec_trainer.speculation.algorithms import trees
from respec_trainer.speculation.algorithms.algorithm import Algorithm

ALGORITHM = Algorithm(
    name="none",
    check=lambda speculation: None,
    depth=trees.depth,
    server_arguments=lambda speculation: {},
    truncates=True,
    drafts=False,
)
