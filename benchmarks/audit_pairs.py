"""Pairs of an actor and a sampler that disagree as kernels in bf16 do, and draws from the sampler, right and wrong.

The logits fall with the logarithm of the rank (Zipf's law), each law with a slope of its own: in two of five laws the
likeliest token has a probability above 0.97. Both sides see them with independent errors, and round to bf16.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from respec_trainer.audit.law import laws
from respec_trainer.audit.scores import UNCERTAIN, Draws, Strata, strata
from respec_trainer.rollout.sample import SamplingParams

VOCAB = 32
OFFSET = 10.0  # of the likeliest token's logit: bf16 rounds numbers of this size to 1/16
# A planted fault: the sampler's laws [T, V] -> the laws that tokens are really drawn from.
Fault = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """The difference between actor and sampler."""

    error: float = 0.0  # standard deviation of each side's errors of logits, before rounding
    bf16: bool = True
    stale: float = 0.0  # scale of what the actor learned since, by logit: Student's t with 3 degrees of freedom
    params: SamplingParams = SamplingParams(1)

    def draw(self, count: int, generator: torch.Generator, fault: Fault | None = None) -> Drawn:
        true = zipf_logits(count, generator)
        actor = true + self.stale * student(true.shape, generator) if self.stale else true
        actor, sampler = (self._seen(logits, generator) for logits in (actor, true))
        reported = laws(sampler, self.params).probs
        tokens = torch.multinomial(fault(reported) if fault else reported, 1, generator=generator)
        return Drawn(actor, tokens[:, 0], reported.gather(1, tokens)[:, 0].log(), self.params)

    def _seen(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen = logits + self.error * torch.randn(logits.shape, generator=generator)
        return seen.bfloat16().float() if self.bf16 else seen


@dataclass(frozen=True)
class Drawn:
    """The inputs of an audit."""

    logits: torch.Tensor  # [T, V] the actor's
    tokens: torch.Tensor  # [T]
    sampler_logprobs: torch.Tensor  # [T]
    params: SamplingParams

    def sums(self, weighted: bool = True) -> Strata:
        """Return the audit's sums. Without `weighted` every token counts 1, as if actor and sampler agreed."""
        actor, rows = laws(self.logits, self.params), torch.arange(len(self.tokens))
        log_ratio = actor.probs[rows, self.tokens].log() - self.sampler_logprobs
        ratios = log_ratio.exp() if weighted else torch.ones_like(log_ratio)
        return strata(actor, Draws(rows, self.tokens, torch.ones_like(ratios), ratios))

    def log_ratios(self) -> torch.Tensor:
        """Return log rho [T]; -inf where the actor would not draw the token."""
        return (
            (laws(self.logits, self.params).probs.gather(1, self.tokens[:, None])[:, 0]).log() - self.sampler_logprobs
        )


def zipf_logits(count: int, generator: torch.Generator) -> torch.Tensor:
    slopes = 4.5 * (0.8 * torch.randn(count, 1, generator=generator)).exp()
    single = 0.5 * torch.randn(count, VOCAB, generator=generator)
    return OFFSET - slopes * torch.arange(1, VOCAB + 1).log() + single


def student(shape: torch.Size, generator: torch.Generator, df: int = 3) -> torch.Tensor:
    """Draw from Student's t, whose tails are so heavy that some probabilities change by a factor of 50 and more."""
    squares = sum(torch.randn(shape, generator=generator) ** 2 for _ in range(df))
    return torch.randn(shape, generator=generator) / (squares / df).sqrt()


def shift(share: float, source: slice, target: slice) -> Fault:
    """Move mass between ranks where the sampler is uncertain: `share`, or all that the source has if that is less."""

    def fault(probs: torch.Tensor) -> torch.Tensor:
        ordered, order = probs.sort(stable=True, dim=1, descending=True)
        given, taken = torch.zeros_like(ordered), torch.zeros_like(ordered)
        given[:, target], taken[:, source] = ordered[:, target], ordered[:, source]
        moved = taken.sum(1, keepdim=True).clamp(max=share) * (ordered[:, :1] < UNCERTAIN)
        parts = [part / part.sum(1, keepdim=True).clamp(min=1e-30) for part in (given, taken)]
        return torch.empty_like(probs).scatter_(1, order, (ordered + moved * (parts[0] - parts[1])).clamp(min=0))

    return fault


def accept(threshold: float, added: float = 0.0) -> Fault:
    """Accept the draft, the likeliest token, with probability p / threshold + added; then draw from what is left."""

    def fault(probs: torch.Tensor) -> torch.Tensor:
        best = torch.nn.functional.one_hot(probs.argmax(1), probs.shape[1])
        p = probs.amax(1, keepdim=True)
        accepted = (p / threshold + added).clamp(max=1.0)
        return torch.where(best.bool(), accepted, probs * (1 - accepted) / (1 - p).clamp(min=1e-12))

    return fault


def outdated(scale: float, seed: int = 0) -> Fault:
    """Draw from weights that are older than those whose log-probs are reported: each logit is off by `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def fault(probs: torch.Tensor) -> torch.Tensor:
        return (probs.clamp(min=1e-30).log() + scale * torch.randn(probs.shape, generator=generator)).softmax(1)

    return fault
