"""Algorithm: what the trainer must know about one way to draft tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from respec_trainer.config import SpeculationConfig


class DrafterFolder(Enum):
    """What `drafter.path` may name. The values say what to give, for error texts.

    `preflight/drafters.py` has a check for each kind, and `audit/auditor.py` a folder for each.
    """

    EAGLE3 = "a drafter made by tools/train_drafter.py"
    MODEL = "the folder of a smaller model with the same vocabulary"


@dataclass(frozen=True)
class Algorithm:
    """One value of `speculation.algorithm`.

    Args:
        check: raises ConfigError, naming keys and remedy, for a shape (steps, topk, draft_tokens) that cannot work.
        depth: the most drafts that one verify pass can accept.
        server_arguments: its keyword arguments of sglang's ServerArgs, `speculative_algorithm` among them. Paths,
            devices and what all algorithms share are not among them: `rollout/sglang/arguments.py` adds those.
        audit_shape: speculation keys of its mode in an audit, for an algorithm that `audit/cells.py` does not name.
    """

    name: str
    check: Callable[[SpeculationConfig], None]
    depth: Callable[[SpeculationConfig], int]
    server_arguments: Callable[[SpeculationConfig], dict[str, Any]]
    audit_shape: Mapping[str, Any] = field(default_factory=dict)
    drafts: bool = True  # whether there is speculation at all
    folder: DrafterFolder | None = None  # what drafter.path must name; None: the algorithm has no drafter
    samples: bool = False  # its drafter can draw its drafts at random, as speculation.rejection_sampling wants
    adapts: bool = False  # its draft steps can change while the engine runs, in chains
    learns: bool = False  # its drafter can be trained online
    pushes: bool = False  # its drafter's weights go into running engines, trained or not
    exports: bool = False  # checkpoints and exports hold a copy of its drafter's folder
