"""Sample: one response to one prompt, with the sampler's log-probabilities and versions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

# lost: the engine died before the response was finished. Such a Sample never leaves rollout/.
FinishReason = Literal["stop", "length", "lost"]

# Origins of a response token: drawn without a draft; an accepted draft; drawn by the target after the accepted drafts.
UNDRAFTED, ACCEPTED, BONUS = 0, 1, 2


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. `top_k=-1` and `top_p=1` keep the whole vocabulary; `seed` fixes the draws."""

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
    """A request for one response. Its `key` is copied to the Sample, so that samples can be matched to requests."""

    key: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


def with_seed(request: Request, run_seed: int) -> Request:
    """Return the request with a 63-bit seed, a hash of the run's seed and its key, the same on every machine."""
    digest = hashlib.sha256(f"{run_seed}:{request.key}".encode()).digest()
    return replace(request, sampling=replace(request.sampling, seed=int.from_bytes(digest[:8], "big") >> 1))


@dataclass
class Sample:
    """A response. Lists have one entry for each response token unless noted."""

    key: str
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logprobs: list[float]  # of the distribution drawn from: at the temperature, after top_k and top_p
    finish_reason: FinishReason
    actor_version: str  # of the weights that drew the response
    drafter_version: str
    verify_count: int = 0  # target passes after the prompt's; 0 without speculation
    # [d] = passes in which d drafts were accepted, those behind the response's end included
    accept_histogram: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)  # UNDRAFTED, ACCEPTED or BONUS
    restarts: int = 0  # times the engine died during this response and continued it after a restart
    reward: float | None = None  # None: not scored yet, or skipped by the reward function
    reward_parts: dict[str, float] = field(default_factory=dict)  # by name, if the reward has named parts

    @property
    def accept_length(self) -> float:
        """Tokens that the response kept per verify pass, the bonus token included; 1.0 without speculation."""
        return accept_length([self])


def accept_length(samples: Sequence[Sample]) -> float:
    """Return the tokens that the samples kept per verify pass, the bonus token included; 1.0 without speculation.

    What a response's last pass accepted behind its end is not counted, and neither is the bonus token of that pass if
    the response ends with a draft. `accept_histogram` counts both.
    """
    passes = sum(sample.verify_count for sample in samples)
    drafts = sum(sample.origins.count(ACCEPTED) for sample in samples)
    cut = sum(sample.origins[-1:] == [ACCEPTED] for sample in samples)
    return 1.0 + (drafts - cut) / passes if passes else 1.0
