"""Sample: one response to one prompt, with what the sampler knew when it drew it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

# lost: the engine died before the response was finished. Such a Sample never leaves rollout/.
FinishReason = Literal["stop", "length", "lost"]

# Where a response token came from.
UNDRAFTED, ACCEPTED, BONUS = 0, 1, 2  # drawn without a draft; a draft that was accepted; drawn after the accepted ones


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. `top_k=-1` and `top_p=1` keep the whole vocabulary; `seed` fixes the draws."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One response asked for. `key` comes back in the Sample, so that answers can be matched to questions."""

    key: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


def with_seed(request: Request, run_seed: int) -> Request:
    """The request with a seed of 63 bits: of the run's and its key, the same on every machine."""
    digest = hashlib.sha256(f"{run_seed}:{request.key}".encode()).digest()
    return replace(request, sampling=replace(request.sampling, seed=int.from_bytes(digest[:8], "big") >> 1))


@dataclass
class Sample:
    """One response. Lists run over response tokens unless said otherwise."""

    key: str
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logprobs: list[float]  # of each response token, at the sampling temperature, from the engine's verification
    finish_reason: FinishReason
    actor_version: str  # of the weights that drew the response
    drafter_version: str
    verify_count: int = 0  # target passes that verified drafts; 0 without speculation
    accept_histogram: list[int] = field(default_factory=list)  # [d] = verify passes in which d drafts were accepted
    origins: list[int] = field(default_factory=list)  # UNDRAFTED, ACCEPTED or BONUS
    restarts: int = 0  # times the engine died while drawing it, and another life went on from the tokens so far
    reward: float | None = None  # None: not scored yet, or skipped by the reward
    reward_parts: dict[str, float] = field(default_factory=dict)  # where the reward has named parts

    @property
    def accept_length(self) -> float:
        """Tokens gained per verify pass, the bonus token counted; 1.0 without speculation."""
        if not self.verify_count:
            return 1.0
        drafts = sum(depth * count for depth, count in enumerate(self.accept_histogram))
        return 1.0 + drafts / self.verify_count
