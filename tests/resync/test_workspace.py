"""resync/workspace.py: buffers are reused and grow, and old ones are freed first."""

from __future__ import annotations

import torch

from respec_trainer.resync.workspace import Workspace


def test_a_buffer_is_used_again_and_grows():
    workspace = Workspace(torch.device("cpu"))
    first = workspace.take("bucket", 100, torch.float32)
    assert first.shape == (100,) and first.dtype == torch.float32
    again = workspace.take("bucket", 50, torch.bfloat16)
    assert again.data_ptr() == first.data_ptr() and again.dtype == torch.bfloat16 and again.shape == (50,)
    larger = workspace.take("bucket", 101, torch.float32)
    assert larger.numel() == 101
    assert workspace.take("shards", 10, torch.float32).data_ptr() != larger.data_ptr()
    assert sum(len(buffer) for buffer in workspace.buffers.values()) == 101 * 4 + 10 * 4


def test_a_dropped_buffer_stays_with_its_holder():
    workspace = Workspace(torch.device("cpu"))
    held = workspace.take("bucket", 4, torch.float32).fill_(7)
    workspace.drop("bucket")
    workspace.take("bucket", 4, torch.float32).fill_(8)
    assert held.tolist() == [7] * 4


def test_release_keeps_a_cpus_memory_and_gives_a_gpus_back():
    for device, kept in (("cpu", 1), ("meta", 0)):
        workspace = Workspace(torch.device(device))
        workspace.take("bucket", 4, torch.float32)
        workspace.release()
        assert len(workspace.buffers) == kept


def test_buffers_lie_on_the_workspaces_device():
    assert Workspace(torch.device("meta")).take("bucket", 4, torch.float32).device.type == "meta"


def test_an_old_buffer_is_freed_before_a_larger_one_is_made(monkeypatch):
    workspace, held, empty = Workspace(torch.device("cpu")), [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **options: held.append(list(workspace.buffers)) or empty(*args, **options)
    )
    for numel in (4, 8):
        workspace.take("bucket", numel, torch.float32)
    assert held == [[], []]
