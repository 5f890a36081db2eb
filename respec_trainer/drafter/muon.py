"""Muon: gradient descent with momentum whose update of a matrix is made orthogonal (Jordan et al. 2024).

Five steps of a quintic Newton-Schulz iteration, with their coefficients, turn the update G = U S V^T into about U V^T.
torch.optim.Muon computes the same, but iterates in bf16 on every machine: some twenty times slower than float32 on a
processor without instructions for it (docs/benchmarks.md). This one iterates in bf16 only where that is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from respec_trainer.compat.precision import bf16_is_quick

A, B, C = 3.4445, -4.7750, 2.0315  # steep at zero, so that few steps do; singular values end between 0.7 and 1.2
STEPS = 5
EPS = 1e-7


class Muon(Optimizer):
    """Optimizer of matrices [out, in]; `weight_decay` is decoupled. If out > in, `lr` is scaled by sqrt(out / in)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if shapes := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon is for matrices, not for parameters of shape {shapes[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                self._update(weight, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, weight: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        update = orthogonal(weight.grad.lerp(average, momentum))  # Nesterov's momentum
        rows, columns = weight.shape
        weight.mul_(1 - lr * weight_decay)
        weight.add_(update, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate U V^T of a matrix U S V^T [out, in] by Newton-Schulz, in the matrix's dtype."""
    quick = matrix.device.type == "cuda" or bf16_is_quick()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.bfloat16 if quick else torch.float32)
    x = x / x.norm().clamp(min=EPS)  # the norm is at least the largest singular value, so all become at most 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if wide is matrix else x.T).to(matrix.dtype)
