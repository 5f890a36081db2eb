"""The memory of a push: two buffers, used again by every bucket and every push."""

from __future__ import annotations

import torch


class Workspace:
    """Scratch memory on one device. What was taken under a name is overwritten when that name is taken again.

    On a CPU the buffers stay from push to push: fresh memory would cost as much time as the transfer, page by page. On
    a GPU they are given back by `release`, because the room is the engine's between pushes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of `numel` elements with undefined content."""
        size = numel * dtype.itemsize
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers.pop(name, None)  # before its successor is made, so that both never exist together
            self.buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.buffers[name][:size].view(dtype)

    def forget(self, name: str) -> None:
        """The next `take` of this name gets fresh memory; whoever holds the old one keeps it."""
        self.buffers.pop(name, None)

    def release(self) -> None:
        """After a push: give the memory back, where it is a GPU's."""
        if self.device.type != "cpu":
            self.buffers.clear()
