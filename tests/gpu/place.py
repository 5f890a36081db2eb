"""Where the GPU tests run: on GPUs, or, to rehearse the tests' own code where there is none, on the CPU.

A rehearsal (RESPEC_GPU_TESTS=cpu) says nothing of a GPU, and its times are not those of anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
DEVICE = os.environ.get("RESPEC_GPU_TESTS", "cuda")
ON_GPU = DEVICE == "cuda"


# sglang's fused kernels are made for 16 bits; this has an engine in float32 compute with torch's own operators.
FLOAT32 = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"} if ON_GPU else {}


def claim() -> None:
    """The first thing a rank does: `run_ranks` says CPU to every process, and DeepSpeed asks once, when imported."""
    os.environ["DS_ACCELERATOR"] = DEVICE


def search_path() -> str:
    """The repository, before what the environment adds."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def devices() -> int:
    """GPUs to test on; a rehearsal has room for two ranks."""
    return torch.cuda.device_count() if ON_GPU else 2


def used_bytes() -> int:
    """Of the first GPU, by all processes; 0 in a rehearsal."""
    if not ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def missing(gpus: int) -> str | None:
    """Why a test that needs this many GPUs cannot run; None if it can."""
    if DEVICE not in ("cuda", "cpu"):
        return f"RESPEC_GPU_TESTS={DEVICE}: set cuda, or cpu for a rehearsal"
    if ON_GPU and not torch.cuda.is_available():
        return "torch.cuda.is_available() is false here; RESPEC_GPU_TESTS=cpu rehearses the tests without a GPU"
    if devices() < gpus:
        return f"needs {gpus} GPUs, and {devices()} are visible"
    return None


def machine() -> dict[str, str]:
    """What results hold for: the device and the versions of what computes."""
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
