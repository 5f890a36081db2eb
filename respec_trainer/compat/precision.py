"""Support of number formats by this machine's processor."""

from __future__ import annotations


def bf16_is_quick() -> bool:
    """Return whether this processor multiplies bf16 matrices in hardware; emulated bf16 is slower than fp32."""
    import torch

    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def slow_dtype(dtype: str, device: str) -> str | None:
    """Return a message for the user if `dtype` ("bf16" or "fp32") is slow on `device` ("cpu" or "cuda"), or None."""
    if device != "cpu" or dtype != "bf16" or bf16_is_quick():
        return None
    return "this processor has no bf16 instructions, and emulates them slowly: model.dtype=fp32 is faster"
