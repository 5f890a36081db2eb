"""Reading tensors whose memory was moved to the host. With an engine: tests/integration/checkpoint/test_actor.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from respec_trainer.actor import offload as offload_module
from respec_trainer.actor import state


@pytest.mark.parametrize("piece", [16, 20, 1 << 20])
def test_a_stretch_is_the_same_on_the_device_and_in_pieces_off_it(monkeypatch, piece):
    for module in (offload_module, state):
        monkeypatch.setattr(module, "PIECE", piece)
    whole = torch.arange(40.0)
    view, other = whole[4:], torch.arange(3.0)
    stretches = [(0, 36), (1, 7), (3, 1), (30, 6), (5, 0)]
    expected = [view[start : start + length].clone() for start, length in stretches]
    zero = SimpleNamespace(flat=view, optimizer=SimpleNamespace(state={}))
    offload = offload_module.Offload(SimpleNamespace(module=torch.nn.Linear(1, 1), optimizer=zero), moves=True)
    assert not offload.pieces_away()
    offload.out("optimizer")
    assert whole.untyped_storage().nbytes() == 0
    away = offload.pieces_away()
    for (start, length), values in zip(stretches, expected, strict=True):
        assert torch.equal(state.copy_from(view, start, away, torch.empty(length)), values)
    assert state.copy_from(other, 1, away, torch.empty(2)).tolist() == [1, 2]
