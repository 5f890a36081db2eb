"""Part: some of the memory of one GPU, and the phases of an iteration in which it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["generate", "train", "resync"]
PHASES: tuple[Phase, ...] = ("generate", "train", "resync")


@dataclass(frozen=True)
class Part:
    """`how` is where its bytes come from, in words."""

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    how: str
