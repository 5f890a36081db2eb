"""The device of the GPU tests: GPUs, or, for a rehearsal of the tests' own code, the CPU.

A rehearsal (RESPEC_GPU_TESTS=cpu) shows nothing about GPUs, and its times have no meaning.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
DEVICE = os.environ.get("RESPEC_GPU_TESTS", "cuda")
ON_GPU = DEVICE == "cuda"

# sglang's fused kernels take 16-bit numbers only. With this, an engine in float32 uses torch's own operators.
FLOAT32 = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"} if ON_GPU else {}


def claim() -> None:
    """Set the device for DeepSpeed, which reads it on import. A rank calls this first: `run_ranks` sets "cpu"."""
    os.environ["DS_ACCELERATOR"] = DEVICE


def search_path() -> str:
    """Return a PYTHONPATH: the repository, then the paths of the environment."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def devices() -> int:
    """Return the number of GPUs to test on; for a rehearsal 2, the most ranks it should run."""
    return torch.cuda.device_count() if ON_GPU else 2


def used_bytes() -> int:
    """Return the bytes of the first GPU that all processes use; 0 in a rehearsal."""
    if not ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def missing(gpus: int) -> str | None:
    """Return why a test that needs `gpus` GPUs cannot run; None if it can."""
    if DEVICE not in ("cuda", "cpu"):
        return f"RESPEC_GPU_TESTS={DEVICE}: set cuda, or cpu for a rehearsal"
    if ON_GPU and not torch.cuda.is_available():
        return "torch.cuda.is_available() is false here; RESPEC_GPU_TESTS=cpu rehearses the tests without a GPU"
    if devices() < gpus:
        return f"needs {gpus} GPUs, and {devices()} are visible"
    return None


def machine() -> dict[str, str]:
    """Return the device and the versions of the libraries for which results hold."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"device": torch.cuda.get_device_name(0) if ON_GPU and torch.cuda.is_available() else "CPU (rehearsal)"}
    found |= {"gpus": str(devices() if ON_GPU else 0), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("sglang", "sglang-kernel", "triton", "transformers", "deepspeed", "megatron-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
