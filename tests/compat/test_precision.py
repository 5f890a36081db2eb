"""compat/precision.py: the user is notified if bf16 is emulated."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.compat.precision import bf16_is_quick, slow_dtype


@pytest.fixture(params=[{}, {"avx2": True}, {"avx512_bf16": True}, {"amx_bf16": True}], ids=str)
def features(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: request.param)
    return request.param


def test_bf16_is_quick_where_the_processor_has_instructions_for_it(features):
    assert bf16_is_quick() == any(name.endswith("bf16") for name in features)


def test_slow_bf16_is_reported(features):
    told = slow_dtype("bf16", "cpu")
    assert (told is None) == bf16_is_quick()
    assert told is None or "model.dtype=fp32" in told
    assert slow_dtype("fp32", "cpu") is None and slow_dtype("bf16", "cuda") is None
