"""Reading tensors whose memory was moved to the host. On an engine: tests/integration/test_checkpoint_actor.py."""

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
    content = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage())
    stretches = [(0, 36), (1, 7), (3, 1), (30, 6), (5, 0)]
    expected = [view[start : start + length].clone() for start, length in stretches]
    pieces = [part.clone() for part in content.split(piece)]
    offload = SimpleNamespace(_away={"optimizer": [(content, pieces)]})
    content.untyped_storage().resize_(0)
    away = state.pieces_away(offload)
    for (start, length), values in zip(stretches, expected, strict=True):
        assert torch.equal(state.copy_from(view, start, away, torch.empty(length)), values)
    assert state.copy_from(other, 1, away, torch.empty(2)).tolist() == [1, 2]
