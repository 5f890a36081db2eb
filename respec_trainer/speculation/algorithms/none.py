"""none: no speculation. The other keys of the section are not used, so that a run can be compared without it."""

from __future__ import annotations

from respec_trainer.speculation.algorithms import trees
from respec_trainer.speculation.algorithms.algorithm import Algorithm

ALGORITHM = Algorithm(
    name="none",
    check=lambda speculation: None,
    depth=trees.depth,
    server_arguments=lambda speculation: {},
    drafts=False,
)
