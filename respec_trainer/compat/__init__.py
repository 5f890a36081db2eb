"""Shims for other libraries: one module for each library, with the reason and the version it was written for."""

from __future__ import annotations

from typing import Literal


def prepare(device: Literal["auto", "cpu", "cuda"]) -> str:
    """Apply the shims that must come before transformers and DeepSpeed are imported; returns "cpu" or "cuda".

    Raises UnsupportedVersionError if a library has another version than its shim was written for.
    """
    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

    define_torchvision_operators()
    from respec_trainer.compat.deepspeed_cpu import prepare_deepspeed

    resolved = resolve_device(device)
    prepare_deepspeed(resolved)
    return resolved


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> str:
    """Return the device that `run.device` selects on this machine, "cpu" or "cuda"."""
    import torch

    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
