"""Megatron-core 0.16.1 without a GPU, and inside DeepSpeed.

- Its rotary embedding, its buffer pool and its sequence-parallel mappings place tensors on
  `torch.cuda.current_device()`, which raises if torch has no CUDA. A `torch.device` works as well.
- Activation recompute saves and restores CUDA's random state, which does not exist without a GPU.
- Its parallel linears put `_extra_state: None` into state dicts, which DeepSpeed's checkpoint tools treat as tensors.
"""

from __future__ import annotations

import torch

from respec_trainer.compat.versions import require_version


def prepare_megatron(device_type: str) -> None:
    """Apply the shims to this process, whose models are on `device_type`, "cpu" or "cuda". Idempotent.

    The first two only apply to "cpu".
    """
    require_version("megatron-core", "0.16.1", "respec_trainer.compat.megatron_cpu")
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for linear in (ColumnParallelLinear, RowParallelLinear):
        linear.get_extra_state = torch.nn.Module.get_extra_state
    if device_type != "cpu":
        return
    torch.cuda.current_device = _the_cpu
    random._get_cuda_rng_state = _no_state
    random._set_cuda_rng_state = _ignore_state


def _the_cpu() -> torch.device:
    return torch.device("cpu")


def _no_state(*_args, **_kwargs) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _ignore_state(*_args, **_kwargs) -> None:
    return None
