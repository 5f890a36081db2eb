"""DepthSettings and DecodeLog: the settings that choose an engine's draft steps, and the log of its batches.

Both are plain data. DepthSettings goes to the engine's processes when they start; a DecodeLog comes back after a phase.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from respec_trainer.errors import ConfigError, EngineError

STEPS_MESSAGE = "respec_steps"  # names a request to an engine for its log, or to change its settings
DEFAULT_POLICY = "respec_trainer.speculation.scheduler:DepthScheduler"


def check_candidates(candidates: Sequence[int]) -> None:
    """Raise ConfigError unless there are candidate draft steps, rising from 0 or more."""
    if not candidates or sorted(set(candidates)) != list(candidates) or candidates[0] < 0:
        raise ConfigError(f"candidate steps must rise from 0 or more, not {list(candidates)}")


class RequestsRunningError(EngineError):
    """The engine has running requests, so it cannot change how it chooses draft steps."""

    def __init__(self, text: str = "draft steps cannot be set while requests run: collect them first"):
        super().__init__(text)


@dataclass(frozen=True)
class DepthSettings:
    """Settings of how an engine's draft steps change while it runs. Chains only: s drafts, s + 1 tokens verified.

    mode "adaptive" chooses by `costs` (speculation.scheduler); "random" draws among the candidates, for profiles;
    "fixed" always takes `fixed`, for baselines with the same cost of logging. Raises ConfigError for values that do
    not fit together.
    """

    mode: Literal["adaptive", "random", "fixed"]
    candidates: tuple[int, ...]  # rising; 0 is plain decoding
    max_batch: int  # sequences at most
    max_context: int  # tokens of a sequence at most
    costs: dict[str, tuple[float, ...]] | None = None  # CostModel's terms by piece, in the order of cost.Terms
    prior: tuple[float, ...] = ()  # acceptance by depth from which the estimate starts
    fixed: int | None = None
    explore: float = 0.005  # largest share of the time to spend on choices that seem worse, to measure them
    # While speculation is off: "defer" keeps the tokens that the drafter has not read until speculation is on again;
    # "warm" lets the drafter read every token at once.
    off: Literal["defer", "warm"] = "defer"
    backlog_mb: int = 256  # size of the kept tokens above which the drafter reads them although speculation is off
    # Tokens of the backlog that the drafter reads in one decode step. A longer backlog takes several steps, which still
    # decode without speculation. None: all at once.
    catch_up_tokens: int | None = None
    # For profiles: wait for the GPU between parts, so that each part's time is its own. On a CPU, count only the time
    # in which the engine's thread computed, so that other work on its cores is not included.
    timed: bool = False
    graph_sizes: tuple[int, ...] = ()  # batch sizes of the CUDA graphs that `costs` were measured with; (): none
    seed: int = 0  # of mode "random"
    # Tests and benchmarks only: drafts are kept at random so that a pass keeps this many tokens, bonus included.
    simulated_accept_length: float | None = None
    policy: str = DEFAULT_POLICY  # mode "adaptive": module:class of the depth policy; its `of(settings)` makes it
    policy_options: dict[str, Any] = field(default_factory=dict)  # JSON values, for policies other than the default

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        if self.candidates[-1] == 0:
            raise ConfigError("the only candidate is 0 draft steps: start the engine without speculation instead")
        if self.mode == "fixed" and self.fixed not in self.candidates:
            raise ConfigError(f"fixed={self.fixed} is not one of the candidate steps {list(self.candidates)}")
        if self.mode == "adaptive" and self.policy == DEFAULT_POLICY and self.costs is None:
            raise ConfigError("adaptive steps are chosen by costs: measure a profile (tools/profile_speculation.py)")
        if self.catch_up_tokens is not None and self.catch_up_tokens < 1:
            raise ConfigError(f"catch_up_tokens={self.catch_up_tokens} would never catch up: set at least 1, or None")
        length = self.simulated_accept_length
        if length is not None and not 1 <= length <= self.most + 1:
            raise ConfigError(f"simulated_accept_length={length} is not between 1 and {self.most + 1}, all drafts kept")

    @property
    def most(self) -> int:
        return self.candidates[-1]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> DepthSettings:
        """Read the output of `to_json`."""
        found = json.loads(text)
        costs = found["costs"]
        if costs is not None:
            costs = {piece: tuple(terms) for piece, terms in costs.items()}
        tuples = {name: tuple(found[name]) for name in ("candidates", "graph_sizes", "prior")}
        return cls(**found | {"costs": costs} | tuples)


@dataclass
class DecodeLog:
    """The log of the batches that an engine ran: one entry a batch, in columns of length N. Times are seconds.

    `tokens` of a decode batch are those that responses kept, bonus tokens included: what was accepted behind the end of
    a response is not among them. Together they are the tokens of all responses but the first of each, which comes with
    its prompt. Of a prefill batch they are the prompt tokens read. `survivors[i, d]` counts the sequences that kept at
    least d + 1 drafts, those behind a response's end included.
    """

    start: np.ndarray = field(default_factory=lambda: np.zeros(0))  # on the engine's clock, whose zero is arbitrary
    prefill: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # True: reads prompts; False: decodes
    batch: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # sequences
    context: np.ndarray = field(default_factory=lambda: np.zeros(0))  # mean tokens of a sequence so far
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # drafted; 0: plain decoding
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # kept by all responses
    survivors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [N, most steps]
    draft: np.ndarray = field(default_factory=lambda: np.zeros(0))  # all draft steps
    verify: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the target's pass; with steps=0 a plain one
    extend: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the drafter's pass over tokens kept or read
    catch_up: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the drafter's pass over its backlog
    caught_up: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens read from the backlog
    switch: np.ndarray = field(default_factory=lambda: np.zeros(0))  # changing the engine's state to other steps
    decide: np.ndarray = field(default_factory=lambda: np.zeros(0))  # choosing the steps
    predicted: np.ndarray = field(default_factory=lambda: np.zeros(0))  # speed-up over plain decoding; 0: unknown
    failures: int = 0  # of the depth chooser; after one, speculation stays off
    dropped: int = 0  # entries discarded, the oldest first, because no call took them in time
    state: str = ""  # JSON state of the depth chooser, for `RolloutEngine.restore_depth_chooser`; "": none
    graph_sizes: tuple[int, ...] = ()  # batch sizes of the engine's CUDA graphs

    def __len__(self) -> int:
        return len(self.start)

    @property
    def period(self) -> np.ndarray:
        """Seconds from each batch's start to the next batch's start, idle time included; NaN for the last batch."""
        return np.append(np.diff(self.start), np.nan) if len(self) else np.zeros(0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return every column and count by name, in the form that `numpy.savez` takes."""
        return {name: np.asarray(getattr(self, name)) for name in self._names()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> DecodeLog:
        """Read the output of `to_arrays`."""
        found = {name: arrays[name] for name in cls._names()}
        return cls(**(found | {name: int(found[name]) for name in ("failures", "dropped")}))

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, state=self.state, graph_sizes=np.array(self.graph_sizes, np.int64), **self.to_arrays())
        return file.getvalue()

    @classmethod
    def of_bytes(cls, content: bytes) -> DecodeLog:
        """Read the output of `to_bytes`."""
        with np.load(io.BytesIO(content)) as arrays:
            more = {"state": str(arrays["state"]), "graph_sizes": tuple(arrays["graph_sizes"].tolist())}
            return replace(cls.of_arrays(dict(arrays)), **more)

    @classmethod
    def _names(cls) -> list[str]:
        return [part.name for part in fields(cls) if part.name not in ("state", "graph_sizes")]
