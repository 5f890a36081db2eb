"""The speculation algorithms, one file each: the source of the drafts, and its properties for the rest of the trainer.

To add a draft source, add one file to this package and its name to the list below. Importing this package is cheap: it
does not import torch.
"""

from __future__ import annotations

from respec_trainer.config import SpeculationConfig
from respec_trainer.registry import Registry
from respec_trainer.speculation.algorithms import eagle3, ngram, none, standalone
from respec_trainer.speculation.algorithms.algorithm import Algorithm, DrafterFolder

__all__ = ["ALGORITHMS", "Algorithm", "DrafterFolder", "algorithm_of", "changes_depth", "is_lossy", "names_of"]

ALGORITHMS: Registry[Algorithm] = Registry("speculation.algorithm")
for module in (
    eagle3,
    standalone,
    ngram,
    none,
):
    ALGORITHMS.add(module.ALGORITHM.name, module.ALGORITHM)


def algorithm_of(speculation: SpeculationConfig) -> Algorithm:
    """Return the Algorithm of `speculation.algorithm`. Raises ConfigError for an unknown name, with the nearest one."""
    return ALGORITHMS[speculation.algorithm]


def is_lossy(speculation: SpeculationConfig) -> bool:
    """True if drafts may be accepted that the policy would not have sampled: then samples do not follow the policy."""
    thresholds = (speculation.accept_threshold_single, speculation.accept_threshold_acc)
    return algorithm_of(speculation).drafts and min(thresholds) < 1


def changes_depth(speculation: SpeculationConfig) -> bool:
    """True if an engine can change its draft steps while it runs: for chains of an algorithm that adapts."""
    return algorithm_of(speculation).adapts and speculation.topk == 1


def names_of(ability: str) -> str:
    """Return the algorithms with the field `ability` of Algorithm set, for error texts: "one" or "one or another"."""
    return " or ".join(name for name in ALGORITHMS if getattr(ALGORITHMS[name], ability))
