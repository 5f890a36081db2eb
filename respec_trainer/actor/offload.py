"""Frees the actor's device memory for generation: first optimizer states and gradients, then weights.

DeepSpeed 0.19.8's own `offload_states` supports ZeRO 1 and 2, but not the bf16 optimizer of ZeRO-1 with float32
gradients, and ZeRO-3 only with its own Adam. So this module works on storages, alike for all of them: a tensor object
keeps its shape, and its storage, which all its views share, is copied to the host and emptied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator

Part = Literal["optimizer", "weights"]
Away = Mapping[int, list[torch.Tensor]]  # address of an emptied storage's record -> its bytes in host memory
PARTS: tuple[Part, ...] = ("optimizer", "weights")  # freed in this order, brought back in the opposite order

# Page-locked memory is allocated in powers of two: in pieces of this size, a large buffer wastes none.
PIECE = 1 << 28  # bytes


class Offload:
    """Moves the tensors of a DeepSpeed engine of ZeRO 1, 2 or 3 off its device and back, bit for bit.

    The part "optimizer" holds AdamW's states, float32 weights, gradients and the buffers in which they are reduced. The
    model's buffers stay on the device. The host memory is kept for the next time. On a CPU nothing is moved, but a
    wrong order is still an error.
    """

    def __init__(self, engine, moves: bool | None = None):
        """`moves`: whether memory is moved; None: only if the engine is not on a CPU."""
        self.engine = engine
        self.device = next(engine.module.parameters()).device
        self.moves = self.device.type != "cpu" if moves is None else moves
        self.away: dict[Part, list[tuple[torch.Tensor, list[torch.Tensor]]]] = {}
        self.spare: dict[int, list[torch.Tensor]] = {}
        # Must run before the hooks in which ZeRO-3 gathers weights.
        engine.module.register_forward_pre_hook(self._require, prepend=True)

    def out(self, part: Part) -> None:
        """Free the device memory of `part`; do nothing if it is free already. The optimizer must be first.

        Call it between updates, because gradients of an unfinished update would be kept too. Raises RuntimeError for a
        wrong order.
        """
        if part in self.away:
            return
        self._check(part, PARTS[: PARTS.index(part)], away=True)
        self.away[part] = []
        if not self.moves:
            return
        contents = list(self.contents(part))
        self.away[part] = [(content, self._to_host(content)) for content in contents]
        get_accelerator().synchronize()
        for content in contents:
            content.untyped_storage().resize_(0)
        get_accelerator().empty_cache()

    def back(self, part: Part) -> None:
        """Bring `part` back; do nothing if it is on the device. Raises RuntimeError unless the weights are first."""
        if part not in self.away:
            return
        self._check(part, PARTS[PARTS.index(part) + 1 :], away=False)
        moved = self.away.pop(part)
        for content, pieces in moved:
            content.untyped_storage().resize_(content.numel())
            for on_device, on_host in zip(content.split(PIECE), pieces, strict=True):
                on_device.copy_(on_host, non_blocking=True)
        if moved:
            get_accelerator().synchronize()
        for piece in (piece for _, pieces in moved for piece in pieces):
            self.spare.setdefault(len(piece), []).append(piece)

    def pieces_away(self) -> Away:
        """Return the host memory of each emptied storage, in pieces of PIECE bytes."""
        moved = [pair for pairs in self.away.values() for pair in pairs]
        return {content.untyped_storage()._cdata: pieces for content, pieces in moved}

    def _check(self, part: Part, others: tuple[Part, ...], away: bool) -> None:
        for other in others:
            if (other in self.away) != away:
                order = "out after" if away else "back before"
                raise RuntimeError(f"the actor's {part} cannot go {order} its {other}: move the {other} first")

    def _require(self, *_: Any) -> None:
        """Raise RuntimeError unless the parts are on the device: the weights, and with gradients also the optimizer."""
        for part in self.away:
            if part == "weights" or torch.is_grad_enabled():
                raise RuntimeError(f"a forward pass while the actor's {part} is off its device: bring it back first")

    def contents(self, part: Part) -> Iterator[torch.Tensor]:
        """Yield every storage of `part` on the device once, as its bytes [N] uint8."""
        parameters = list(self.engine.module.parameters())
        weights = _storages(parameters + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")])
        zero = self.engine.optimizer
        found = weights if part == "weights" else _storages([vars(zero), zero.optimizer.state, parameters])
        for address, storage in found.items():
            if storage.device == self.device and (part == "weights" or address not in weights):
                yield torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def _to_host(self, content: torch.Tensor) -> list[torch.Tensor]:
        """Copy bytes [N] into pieces of host memory. The copy may still run on return."""
        pieces = [self._host_memory(len(piece)) for piece in content.split(PIECE)]
        for on_device, on_host in zip(content.split(PIECE), pieces, strict=True):
            on_host.copy_(on_device, non_blocking=True)
        return pieces

    def _host_memory(self, size: int) -> torch.Tensor:
        if spare := self.spare.get(size):
            return spare.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def _storages(value: Any) -> dict[int, torch.UntypedStorage]:
    """Return {address: storage} of all non-empty tensors in nested containers and data classes, with gradients."""
    found: dict[int, torch.UntypedStorage] = {}
    ahead, seen = [value], set()
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.untyped_storage().nbytes():
                found[value.untyped_storage().data_ptr()] = value.untyped_storage()
            if value.is_leaf and value.grad is not None:
                ahead.append(value.grad)
        elif isinstance(value, Mapping):
            ahead += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            ahead += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            ahead += vars(value).values()
    return found
