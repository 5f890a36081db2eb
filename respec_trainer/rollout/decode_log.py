"""What decides an engine's draft steps while it runs, and what it did, decode batch by decode batch: plain data.

DepthSettings goes into the engine's processes when they start; a DecodeLog comes back after a phase.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from respec_trainer.errors import ConfigError, EngineError

STEPS_MESSAGE = "respec_steps"  # by this name a request for an engine's log, or for other settings, is known in it
DEFAULT_POLICY = "respec_trainer.speculation.scheduler:DepthScheduler"


def check_candidates(candidates: Sequence[int]) -> None:
    """Raise ConfigError unless there are candidate draft steps, rising from 0 or more."""
    if not candidates or sorted(set(candidates)) != list(candidates) or candidates[0] < 0:
        raise ConfigError(f"candidate steps must rise from 0 or more, not {list(candidates)}")


class RequestsRunningError(EngineError):
    """An engine cannot change how it chooses draft steps while it works on requests."""

    def __init__(self, text: str = "steps cannot be set anew while requests run: collect them first"):
        super().__init__(text)


@dataclass(frozen=True)
class DepthSettings:
    """How an engine's draft steps change while it runs. Chains only: s drafts, s + 1 tokens verified.

    mode "adaptive" chooses by `costs` (speculation.scheduler), "random" draws among the candidates, for profiles,
    "fixed" keeps `fixed`, for baselines that pay for the same logging. Raises ConfigError where these do not fit.
    """

    mode: Literal["adaptive", "random", "fixed"]
    candidates: tuple[int, ...]  # rising; 0 is plain decoding
    max_batch: int  # sequences at most
    max_context: int  # tokens a sequence has at most
    costs: dict[str, tuple[float, ...]] | None = None  # CostModel's terms by piece, in the order of cost.Terms
    prior: tuple[float, ...] = ()  # acceptance by depth that the estimate starts from
    fixed: int | None = None
    explore: float = 0.005  # share of the time that trying a choice that seems worse may cost
    # Without speculation: "defer" keeps what the drafter will have to read, for when speculation goes on; "warm" lets
    # it read every token at once.
    off: Literal["defer", "warm"] = "defer"
    backlog_mb: int = 256  # what may be kept for the drafter to read, before it reads it all the same
    # Tokens the drafter catches up with in one decode step; a longer backlog is read over several, which still decode
    # without speculation. None: all at once.
    catch_up_tokens: int | None = None
    # For profiles: wait for the device between parts, so that their times are their own; without one, take the time
    # that the engine's thread computed, so that other work on its cores is not in it.
    timed: bool = False
    seed: int = 0  # of mode "random"
    # Tests and benchmarks only: drafts are kept at random so that a pass keeps this many tokens, bonus included.
    simulated_accept_length: float | None = None
    policy: str = DEFAULT_POLICY  # of mode "adaptive": module:class, made by its `of(settings)` in the engine
    policy_options: dict[str, Any] = field(default_factory=dict)  # JSON, for another policy than the default to read

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        if self.candidates[-1] == 0:
            raise ConfigError("the only candidate is 0: start the engine without speculation instead")
        if self.mode == "fixed" and self.fixed not in self.candidates:
            raise ConfigError(f"fixed={self.fixed} is none of the candidate steps {list(self.candidates)}")
        if self.mode == "adaptive" and self.policy == DEFAULT_POLICY and self.costs is None:
            raise ConfigError("adaptive steps are chosen by costs: measure a profile (tools/profile_speculation.py)")
        if self.catch_up_tokens is not None and self.catch_up_tokens < 1:
            raise ConfigError(f"catch_up_tokens={self.catch_up_tokens} would never catch up: at least 1, or None")
        length = self.simulated_accept_length
        if length is not None and not 1 <= length <= self.most + 1:
            raise ConfigError(f"simulated_accept_length={length} is not between 1 and {self.most + 1}, all tokens kept")

    @property
    def most(self) -> int:
        return self.candidates[-1]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> DepthSettings:
        """The inverse of `to_json`."""
        found = json.loads(text)
        costs = found["costs"]
        if costs is not None:
            costs = {piece: tuple(terms) for piece, terms in costs.items()}
        return cls(**found | {"costs": costs, "candidates": tuple(found["candidates"]), "prior": tuple(found["prior"])})


@dataclass
class DecodeLog:
    """One entry a batch that the engine ran, columns of N each. Times are seconds.

    `tokens` of a decode batch count the bonus tokens; of a prefill they are the prompt tokens read. `survivors[i, d]`
    counts the sequences that kept at least d + 1 drafts.
    """

    start: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the engine's clock: seconds, from any beginning
    prefill: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # reads prompts; else decodes
    batch: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # sequences
    context: np.ndarray = field(default_factory=lambda: np.zeros(0))  # mean tokens a sequence has so far
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # drafted; 0: plain decoding
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # gained by all sequences
    survivors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [N, most steps]
    draft: np.ndarray = field(default_factory=lambda: np.zeros(0))  # all draft steps
    verify: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the target's pass, with steps=0 a plain one
    extend: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the drafter's pass over what was kept or read
    catch_up: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the drafter's pass over its backlog
    caught_up: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens of it
    switch: np.ndarray = field(default_factory=lambda: np.zeros(0))  # changing the engine's state to other steps
    decide: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the policy's own time
    predicted: np.ndarray = field(default_factory=lambda: np.zeros(0))  # speed-up over plain decoding; 0: not known
    failures: int = 0  # of the depth chooser; after one, speculation stays off
    dropped: int = 0  # entries that were thrown away, the oldest first, because nobody took them in time
    state: str = ""  # the depth chooser's, JSON, for `RolloutEngine.restore_depth_chooser`; "": none

    def __len__(self) -> int:
        return len(self.start)

    @property
    def period(self) -> np.ndarray:
        """Seconds from each batch's start to the next one's, what lies between them included; NaN for the last."""
        return np.append(np.diff(self.start), np.nan) if len(self) else np.zeros(0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every column and count by name, as `numpy.savez` takes them."""
        return {name: np.asarray(getattr(self, name)) for name in self._names()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> DecodeLog:
        """The inverse of `to_arrays`."""
        found = {name: arrays[name] for name in cls._names()}
        return cls(**(found | {name: int(found[name]) for name in ("failures", "dropped")}))

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, state=self.state, **self.to_arrays())
        return file.getvalue()

    @classmethod
    def of_bytes(cls, content: bytes) -> DecodeLog:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content)) as arrays:
            return replace(cls.of_arrays(dict(arrays)), state=str(arrays["state"]))

    @classmethod
    def _names(cls) -> list[str]:
        return [part.name for part in fields(cls) if part.name != "state"]
