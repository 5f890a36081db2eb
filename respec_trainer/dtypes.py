"""The number formats by their names in the configuration and in checkpoints."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bf16" or "fp32". Raises KeyError for any other dtype."""
    return {known: name for name, known in DTYPES.items()}[dtype]


def long_name(dtype: torch.dtype) -> str:
    """Return "bfloat16", "float32" and so on: the name in torch, in transformers' config.json and in sglang."""
    return str(dtype).removeprefix("torch.")
