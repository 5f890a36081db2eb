"""DrafterBatch: the responses that a drafter learns from, N right-padded rows, split into batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DrafterBatch:
    """Tokens with their response mask; `weights` are the rows' weights in the loss."""

    tokens: torch.Tensor  # [N, S] int64, prompt, response, padding
    response_mask: torch.Tensor  # [N, S] bool, True on response tokens; never on a row's first token
    weights: torch.Tensor  # [N] float32, >= 0

    def __post_init__(self) -> None:
        if self.tokens.shape != self.response_mask.shape or len(self.weights) != len(self.tokens):
            raise ValueError(
                f"tokens {list(self.tokens.shape)}, response_mask {list(self.response_mask.shape)} and weights "
                f"{list(self.weights.shape)} are not of the same rows"
            )
        if bool(self.response_mask[:, 0].any()):
            raise ValueError("a response that starts at a row's first token has no prompt to be predicted from")

    @classmethod
    def collate(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0) -> DrafterBatch:
        """Make a batch of (prompt ids, response ids) pairs, all of weight one. Raises ValueError for no pairs."""
        if not pairs:
            raise ValueError("no rollouts to learn from")
        width = max(len(prompt) + len(response) for prompt, response in pairs)
        tokens = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            tokens[row, :end] = torch.tensor([*prompt, *response])
            mask[row, len(prompt) : end] = True
        return cls(tokens, mask, torch.ones(len(pairs)))

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: torch.Tensor) -> DrafterBatch:
        """The chosen rows, cut to the length of the longest of them."""
        mask = self.response_mask[index]
        width = max(int(_ends(mask).max()), 1)
        return DrafterBatch(self.tokens[index, :width], mask[:, :width], self.weights[index])

    def to(self, device: torch.device | str) -> DrafterBatch:
        return DrafterBatch(self.tokens.to(device), self.response_mask.to(device), self.weights.to(device))

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """The number of times that each token occurs in the responses, [V] int64."""
        return self.tokens[self.response_mask].bincount(minlength=vocab_size)

    def batches(self, size: int, generator: torch.Generator, by_length: bool = True) -> Iterator[DrafterBatch]:
        """Yield every row once, `size` rows a batch, in random order.

        With `by_length` a batch holds rows of similar length and so little padding. Without it every batch is a fair
        sample of the rows.
        """
        order = torch.randperm(len(self), generator=generator)
        if by_length:
            order = order[_ends(self.response_mask)[order].sort(stable=True).indices]
        groups = order.split(size)
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield self.rows(groups[group])


def _ends(mask: torch.Tensor) -> torch.Tensor:
    """The position after the last True of each row of `mask` [N, S]; 0 for a row without True."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
