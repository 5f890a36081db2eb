"""What a drafter learns from, on its way from the actor's scoring pass to the learner: plain data in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Wanted:
    """What a learner asks of the scoring pass; the same on every rank."""

    layers: tuple[int, ...]  # 0-based decoder layers whose outputs are the features, none of them the last
    draft_ids: torch.Tensor  # [Vd] token ids of the draft vocabulary


@dataclass(frozen=True)
class CapturedRow:
    """One row of L tokens, R of them the response's. Tensors are in the actor's dtype unless said otherwise."""

    row: int  # of the batch that was scored
    features: torch.Tensor  # [L, 3H], the layers' outputs (the residual stream), low to high
    hidden: torch.Tensor  # [R, H] after the final norm, where each response token is predicted from
    logsumexp: torch.Tensor  # [R] float32, of logits / temperature over the whole vocabulary


@dataclass(frozen=True)
class Captured:
    """This rank's share of the rows: tensor-parallel ranks, which score the same batch, deal them among themselves.

    With it the rows of the live actor's vocabulary matrices that are needed to learn from the share: the actor moves
    on, and its features mean nothing beside another actor's embeddings and output weights.
    """

    rows: Sequence[CapturedRow]
    token_ids: torch.Tensor  # [n] ascending, every token that occurs in the batch
    embeddings: torch.Tensor  # [n, H] theirs
    output_rows: torch.Tensor  # [Vd, H] of the output layer, the draft vocabulary's


class LayerOutputs(list):
    """The outputs of chosen layers in a forward pass inside the `with`, as they come."""

    def __init__(self, layers: torch.nn.ModuleList, chosen: Sequence[int]):
        super().__init__()
        self._layers = [layers[index] for index in chosen]

    def __enter__(self) -> LayerOutputs:
        self._hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]
        return self

    def _keep(self, module, inputs, output) -> None:
        self.append(output[0] if isinstance(output, tuple) else output)

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
