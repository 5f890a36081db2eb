"""The data that the actor's scoring pass hands to the drafter's learner: plain tensors in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Wanted:
    """The data that a learner requests from the scoring pass; the same on every rank."""

    layers: tuple[int, ...]  # 0-based decoder layers whose outputs are the features, none of them the last
    draft_ids: torch.Tensor  # [Vd] token ids of the draft vocabulary


@dataclass(frozen=True)
class CapturedRow:
    """One row of L tokens, of which R are the response. Tensors have the actor's dtype, if not noted otherwise."""

    row: int  # index in the batch that was scored
    features: torch.Tensor  # [L, 3H], the layers' outputs (the residual stream), low to high
    hidden: torch.Tensor  # [R, H] after the final norm; entry i predicts response token i
    logsumexp: torch.Tensor  # [R] float32, of logits / temperature over the whole vocabulary


@dataclass(frozen=True)
class Captured:
    """This rank's share of the captured rows. Tensor-parallel ranks score the same batch and divide its rows.

    Also holds the rows of the actor's vocabulary matrices that learning from the share needs. They are copied because
    the actor's weights change, and features are only valid with the embeddings and output weights of the same actor.
    """

    rows: Sequence[CapturedRow]
    token_ids: torch.Tensor  # [n] ascending, every token that occurs in the batch
    embeddings: torch.Tensor  # [n, H] of token_ids
    output_rows: torch.Tensor  # [Vd, H] of the output layer, for the draft vocabulary


class LayerOutputs(list):
    """Collects the outputs of chosen layers in a forward pass inside the `with` statement, in the order computed."""

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
