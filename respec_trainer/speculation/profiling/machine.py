"""Make the Identity of a run for its profile: versions, hardware and shapes, on which its times depend."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from respec_trainer.config import Config
from respec_trainer.speculation.profiling.profile import Identity, shapes_digest

PACKAGES = ("sglang", "torch", "respec_trainer")


def identity_of(config: Config, model: Mapping[str, Any], drafter: Mapping[str, Any], device: str) -> Identity:
    """Return the identity of a run on this machine.

    Args:
        model, drafter: the contents of the config.json files of actor and drafter.
        device: "cpu" or "cuda".
    """
    engine = config.rollout.engine
    return Identity(
        versions={name: version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name() if device == "cuda" else processor(),
        threads=engine.threads,
        model=shapes_digest(model),
        drafter=shapes_digest(drafter),
        dtype=config.model.dtype,
        tp=engine.tp,
    )


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name with family, model and stepping: virtual machines give many CPUs the same name."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    names = [found.get(key) for key in ("model name", "cpu family", "model", "stepping")]
    return " ".join(name for name in names if name) or platform.machine()
