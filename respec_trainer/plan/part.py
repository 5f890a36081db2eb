"""Part: one use of a GPU's memory, and the phases of an iteration in which it is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["generate", "train", "resync"]
PHASES: tuple[Phase, ...] = ("generate", "train", "resync")


@dataclass(frozen=True)
class Part:
    """One use of memory. `how` explains in words where its bytes come from."""

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    how: str
