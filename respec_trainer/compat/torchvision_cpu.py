"""torchvision 0.28.0 from PyPI on a torch without CUDA.

That wheel is a CUDA build, so its library does not load and the operators `nms` and `qnms` stay undefined. Then the
import of torchvision fails, and so do transformers' model classes and sglang. This package never calls the operators:
they only have to exist. With a CUDA torch do not define them, because to define them twice aborts the process.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

_library: torch.library.Library | None = None


def define_torchvision_operators() -> None:
    """Define the two operators if they are missing. Idempotent; call it before importing transformers or sglang."""
    global _library
    if _library is not None or torch.version.cuda is not None or not _is_cuda_wheel():
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _is_cuda_wheel() -> bool:
    try:
        return not version("torchvision").endswith("+cpu")
    except PackageNotFoundError:
        return False
