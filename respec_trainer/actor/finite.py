"""Take an optimizer step, or none on any rank if a loss or a gradient anywhere is not finite.

DeepSpeed refuses a step whose gradient norm is not finite and then clears gradients in its own way for each ZeRO stage.
Two cases escape it: a loss that is not finite though its gradient is, and a replicated weight's gradient, of which the
norm counts only tensor-parallel rank 0's. So all ranks agree first, and to refuse they make the whole gradient NaN:
DeepSpeed's own refusal then does the rest.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def step_if_finite(engine, loss_is_finite: torch.Tensor) -> bool:
    """Whether DeepSpeed `engine` took the step; every rank gets the same answer.

    Without the step no weight, optimizer state or learning rate has changed, and no gradient is left. Call it on all
    ranks after the last backward pass of a minibatch. `loss_is_finite` is this rank's, a bool tensor.
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
    """This rank's part of the gradient, averaged over data parallelism, as DeepSpeed holds it before a step."""
    if isinstance(optimizer, BF16_Optimizer):  # ZeRO-1 of a bf16 model with float32 gradients
        return optimizer.fp32_groups_gradients_flat
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
