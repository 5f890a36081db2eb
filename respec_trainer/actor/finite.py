"""Take an optimizer step, or take none on any rank if a loss or a gradient on some rank is not finite.

DeepSpeed refuses a step whose gradient norm is not finite, and clears gradients in its own way for each ZeRO stage. It
misses two cases: a loss that is not finite with a finite gradient, and the gradient of a replicated weight, because
the norm only counts that of tensor-parallel rank 0. So all ranks agree first. To refuse, they set the whole gradient to
NaN, so that DeepSpeed refuses the step and clears the gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def step_if_finite(engine, loss_is_finite: torch.Tensor) -> bool:
    """Take the step of a DeepSpeed `engine` if all is finite. Return whether it was taken, the same on every rank.

    A refused step changes no weight, optimizer state or learning rate, and leaves no gradient. Call it on all ranks
    after the last backward pass of a minibatch. `loss_is_finite` is a bool tensor for this rank's loss.
    """
    gradients = reduced_gradients(engine.optimizer)
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    bad = (~(loss_is_finite & largest.isfinite())).to(torch.uint8)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    if bad:
        for gradient in gradients:
            gradient.fill_(float("nan"))
    engine.step()
    return engine.was_step_applied()


def reduced_gradients(optimizer) -> list[torch.Tensor]:
    """Return DeepSpeed's tensors of this rank's part of the gradient, averaged over data parallelism, before a step."""
    if isinstance(optimizer, BF16_Optimizer):  # ZeRO-1 with a bf16 model and float32 gradients
        return optimizer.fp32_groups_gradients_flat
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
