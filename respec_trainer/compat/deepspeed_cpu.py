"""DeepSpeed 0.19.8 without a GPU, and without needless messages.

- It guesses its accelerator while it is imported and warns about the guess; DS_ACCELERATOR selects it in advance.
- Making its process group compiles a shared-memory all-reduce, 40 seconds of g++, that only its inference engine uses.
- Its bf16 optimizer prints memory use to stdout, whatever the log level.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

import torch

from respec_trainer.compat.versions import require_version
from respec_trainer.errors import RespecError


def settle_accelerator() -> None:
    """Set the accelerator for DeepSpeed before it is imported, unless the environment sets it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def prepare_deepspeed(device_type: str) -> None:
    """Check DeepSpeed's accelerator ("cpu" or "cuda"), skip needless compilation, and limit its log to errors.

    Idempotent. Raises RespecError if DeepSpeed was imported for the other kind of device.
    """
    require_version("deepspeed", "0.19.8", "respec_trainer.compat.deepspeed_cpu")
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = device_type
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    chosen = get_accelerator().device_name()
    if chosen != device_type:
        raise RespecError(
            f"DeepSpeed was imported for {chosen!r}, but run.device asks for {device_type!r}; start with "
            f"DS_ACCELERATOR={device_type} in the environment"
        )
    import_module("deepspeed.runtime.bf16_optimizer").see_memory_usage = _do_nothing
    if device_type == "cpu":
        # By its full name, because in deepspeed.comm `torch` is the library.
        import_module("deepspeed.comm.torch").build_shm_op = _do_nothing


def _do_nothing(*_args, **_kwargs) -> None:
    return None
