"""Algorithm: the properties of one way to draft tokens that the trainer uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from respec_trainer.config import SpeculationConfig


class DrafterFolder(Enum):
    """The kinds of folders that `drafter.path` may name. The values describe them in error texts.

    `preflight/drafters.py` has a check for each kind, and `audit/auditor.py` a folder for each.
    """

    EAGLE3 = "a drafter made by tools/train_drafter.py"
    MODEL = "the folder of a smaller model with the same vocabulary"


@dataclass(frozen=True)
class Algorithm:
    """One value of `speculation.algorithm`.

    Args:
        check: raises ConfigError, naming keys and remedy, for a shape (steps, topk, draft_tokens) that cannot work.
        depth: returns the most drafts that one verify pass can accept.
        server_arguments: returns the algorithm's keyword arguments of sglang's ServerArgs, `speculative_algorithm`
            included. `rollout/sglang/arguments.py` adds paths, devices and the arguments that all algorithms share.
        audit_shape: speculation keys of the algorithm's mode in an audit, if `audit/cells.py` does not name it.

    Raises ValueError for a description that contradicts itself.
    """

    name: str
    check: Callable[[SpeculationConfig], None]
    depth: Callable[[SpeculationConfig], int]
    server_arguments: Callable[[SpeculationConfig], dict[str, Any]]
    audit_shape: Mapping[str, Any] = field(default_factory=dict)
    drafts: bool = True  # False: there is no speculation
    folder: DrafterFolder | None = None  # what drafter.path must name; None: the algorithm has no drafter
    # Its verification truncates by top_k, then top_p, as SGLang's EAGLE does: then it reports truncated log-probs.
    truncates: bool = False
    samples: bool = False  # the drafter can sample its drafts, which speculation.rejection_sampling needs
    adapts: bool = False  # the draft steps can change while the engine runs, in chains
    learns: bool = False  # the drafter can be trained online
    pushes: bool = False  # the drafter's weights are pushed into running engines, trained or not
    exports: bool = False  # checkpoints and exports contain a copy of the drafter's folder

    def __post_init__(self):
        if self.learns and not self.pushes:  # a drafter that is trained and never pushed would never be used
            raise ValueError(f"algorithm {self.name}: a drafter that learns must also be pushed (pushes=True)")
