"""LossInputs: the inputs of an objective's loss, for some rows of a minibatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossInputs:
    """B rows (whole responses) of S positions, on one device. Entry [b, t] belongs to token t of row b.

    Log-probs and entropies are in nats, given the tokens before t, of the distribution that is sampled: at the sampling
    temperature, after top_k and top_p. Outside `mask` they may have any value, even NaN, and must not affect the loss:
    `log_ratio` and `log_mismatch` are 0 there.
    """

    logprobs: torch.Tensor  # [B, S] float32, of the current actor; the only entry with a gradient
    entropies: torch.Tensor  # [B, S] float32, of the current actor's distribution at t
    old: torch.Tensor  # [B, S] float32, log-probs of the actor before the step's first update
    sampler: torch.Tensor  # [B, S] float32, log-probs of the engine when it drew the token
    advantages: torch.Tensor  # [B] float32, from the objective's `advantages`
    mask: torch.Tensor  # [B, S] bool, True on response tokens; all False in the row of a skipped sample
    weights: torch.Tensor  # [B, S] float32, from the objective's `token_weights`
    origins: torch.Tensor  # [B, S] int8, as Sample.origins

    @property
    def log_ratio(self) -> torch.Tensor:
        """logprobs - old, [B, S]: the log of the importance ratio of the current actor to that before the updates."""
        return self._masked(self.logprobs) - self._masked(self.old)

    @property
    def log_mismatch(self) -> torch.Tensor:
        """old - sampler, [B, S]: the log of the importance ratio of actor to engine."""
        return self._masked(self.old) - self._masked(self.sampler)

    def _masked(self, values: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, values, 0.0)
