"""The memory of a push: buffers that are reused by every bucket and every push."""

from __future__ import annotations

import torch


class Workspace:
    """Named scratch buffers on one device. A buffer is overwritten when its name is taken again.

    On a CPU the buffers are kept between pushes: to allocate new memory would take as long as the transfer. On a GPU
    `release` frees them, because the engine uses that memory between pushes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer of `numel` elements with undefined content."""
        size = numel * dtype.itemsize
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers.pop(name, None)  # before the new one is made, so that both are never in memory together
            self.buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.buffers[name][:size].view(dtype)

    def drop(self, name: str) -> None:
        """Drop a buffer: its holder keeps it, and the next `take` of this name gets new memory."""
        self.buffers.pop(name, None)

    def release(self) -> None:
        """Free the memory after a push, if it is on a GPU."""
        if self.device.type != "cpu":
            self.buffers.clear()
