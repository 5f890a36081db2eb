"""Simulate a rollout under a policy, without an engine: its duration follows from given costs and acceptance.

Each simulated engine decodes the sequences in its slots, one step or cycle after the other, and admits waiting requests
as slots become free. Each engine reads the prompt of a group once, and each response gets its first token from that.
The simulated clock advances by the costs alone.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.shape import chain
from respec_trainer.speculation.simulation.draws import survivals
from respec_trainer.speculation.simulation.trace import Trace


@dataclass(frozen=True)
class Setting:
    """The engines of a simulated rollout. Raises ConfigError on construction for impossible values."""

    engines: int = 1
    slots: int = 64  # sequences that an engine runs at most
    min_free_slots: int = 1  # slots that must be free before waiting requests are admitted
    # shares: requests are distributed at the start, in order. queue: an engine takes the next one when it has room.
    balance: Literal["shares", "queue"] = "shares"
    # True: each draft is kept or not, at random. False: every sequence gains the expected number of tokens.
    sampled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("engines", "slots", "min_free_slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.min_free_slots > self.slots:
            raise ConfigError(f"min_free_slots={self.min_free_slots} are never free of slots={self.slots}")


class SimulatedPolicy(Protocol):
    """A policy as the simulator calls it. `inside/depth_choice.DepthPolicy` is the interface that an engine calls.

    A policy that also has `inform(acceptance, remaining)` is told before each choice what no engine knows: the true
    acceptance of the running responses, [B, D], and the tokens that each still needs, [B]. Its switches cost nothing.
    """

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Return the draft steps for `batch` sequences of `context` tokens on average; 0 is plain decoding.

        `missed` is the mean number of tokens of a sequence that its drafter has not read.
        """

    def observe(self, steps: int, batch: int, survivors: Sequence[float], ends: Ends) -> None:
        """Receive the outcome of a batch of `steps` drafts: survivors[d] sequences kept at least d + 1 drafts."""


class Span(NamedTuple):
    """One decode step or cycle of one engine."""

    start: float  # seconds
    seconds: float
    batch: int
    steps: int
    tokens: float  # gained by all sequences together


@dataclass(frozen=True)
class Outcome:
    """The result of a simulated rollout."""

    makespan: float  # seconds until the last engine has finished
    spans: list[list[Span]]  # of each engine
    switches: int
    not_counted: tuple[str, ...]  # pieces that took no time because the cost model has no times of them
    responses: int

    @property
    def tokens(self) -> float:
        """Tokens of all responses, with the first token of each, which is not part of any span."""
        return self.responses + sum(span.tokens for spans in self.spans for span in spans)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.makespan

    @property
    def off_fraction(self) -> float:
        """Share of the decoding time without speculation."""
        return self._mean(lambda span: span.steps == 0)

    @property
    def mean_batch(self) -> float:
        """Mean batch size over the decoding time of all engines."""
        return self._mean(lambda span: span.batch)

    @property
    def accept_length(self) -> float:
        """Tokens that a sequence gains from a verify pass, with the bonus token; 1.0 without speculation."""
        on = [span for spans in self.spans for span in spans if span.steps]
        return sum(span.tokens for span in on) / sum(span.batch for span in on) if on else 1.0

    def regret(self, references: Iterable[Outcome]) -> float:
        """Return how much longer the rollout took than the fastest of the references, as a fraction of its time."""
        return self.makespan / min(each.makespan for each in references) - 1

    def _mean(self, value: Callable[[Span], float]) -> float:
        spans = [span for spans in self.spans for span in spans]
        return sum(span.seconds * value(span) for span in spans) / sum(span.seconds for span in spans)


def simulate(trace: Trace, costs: CostModel, make_policy: Callable[[], SimulatedPolicy], setting: Setting) -> Outcome:
    """Replay `trace` with one policy for each engine. `costs` are the true costs; a policy may use others."""
    queues = _deal(len(trace), setting)
    slots = min(setting.slots, -(-len(trace) // setting.engines))  # so that the first engine cannot take a whole queue
    engines = [_Engine(trace, costs, make_policy(), queue, slots, setting) for queue in queues]
    due = [(0.0, index) for index in range(len(engines))]
    while due:
        _, index = heapq.heappop(due)
        if engines[index].advance():
            heapq.heappush(due, (engines[index].clock, index))
    makespan = max(engine.clock for engine in engines)
    missing = tuple(piece for piece in ("prefill", "catch_up") if not costs.has(piece))
    spans, switches = [engine.spans for engine in engines], sum(engine.switches for engine in engines)
    return Outcome(makespan, spans, switches, missing, len(trace))


def _deal(count: int, setting: Setting) -> list[deque[int]]:
    """A queue of requests for each engine; the same queue for all if they share it."""
    if setting.balance == "queue":
        return [deque(range(count))] * setting.engines
    owners = [i * setting.engines // count for i in range(count)]
    return [deque(i for i in range(count) if owners[i] == engine) for engine in range(setting.engines)]


class _Engine:
    """The state of one engine at the time `clock`, between two decode steps."""

    def __init__(
        self, trace: Trace, costs: CostModel, policy: SimulatedPolicy, queue: deque[int], slots: int, setting: Setting
    ):
        self.trace, self.costs, self.policy, self.queue = trace, costs, policy, queue
        self.slots, self.setting, self.informed = slots, setting, hasattr(policy, "inform")
        self.clock, self.steps, self.switches = 0.0, None, 0
        self.running = np.zeros(0, dtype=np.int64)
        self.length = trace.length - 1  # tokens to decode of each response
        self.done = np.zeros(len(trace))  # tokens decoded so far
        self.missed = np.zeros(len(trace))  # decoded tokens that the drafter has not read
        self.read: set[int] = set()  # groups whose prompt has been read
        self.spans: list[Span] = []

    def advance(self) -> bool:
        """Admit requests and decode once; return False if nothing is left to do."""
        self._admit()
        while not len(self.running) and self.queue:  # all admitted responses had a single token
            self._admit()
        if not len(self.running):
            return False
        start, batch = self.clock, len(self.running)
        steps = self._choose()
        self.clock += self._switch(steps)
        seconds = self.costs.cycle_seconds(chain(steps), batch, self._context())
        tokens = self._decode(steps)
        self.clock += seconds
        self.spans.append(Span(start, seconds, batch, steps, tokens))
        return True

    def _admit(self) -> None:
        free = self.slots - len(self.running)
        if not self.queue or (free < min(self.setting.min_free_slots, self.slots) and len(self.running)):
            return
        new = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        unread = {group: int(self.trace.prompt[i]) for i in new if (group := self.trace.group[i]) not in self.read}
        self.read.update(unread)
        if self.costs.has("prefill"):
            prompts = list(unread.values()) or [1] * len(new)  # a cached prompt still costs its last token
            self.clock += self.costs.prefill_seconds(len(prompts), sum(prompts) / len(prompts))
        self.running = np.concatenate([self.running, [i for i in new if self.length[i]]]).astype(np.int64)

    def _context(self) -> float:
        return float((self.trace.prompt[self.running] + self.done[self.running]).mean())

    def _choose(self) -> int:
        if self.informed:
            remaining = self.length[self.running] - self.done[self.running]
            self.policy.inform(self.trace.acceptance[self.running], remaining)
        return self.policy.choose(len(self.running), self._context(), float(self.missed[self.running].mean()))

    def _switch(self, steps: int) -> float:
        """Seconds until the engine can decode with `steps`: a switch, and the drafter's reading of missed tokens."""
        before, self.steps = self.steps, steps
        seconds = 0.0
        if before not in (None, steps):
            self.switches += 1
            seconds = self.costs.switch_seconds()
        missed = float(self.missed[self.running].mean())
        if not steps:
            self.missed[self.running] += 1
        elif missed:
            self.missed[self.running] = 0
            if self.costs.has("catch_up"):
                seconds += self.costs.catch_up_seconds(len(self.running), self._context(), missed)
        return 0.0 if self.informed else seconds

    def _decode(self, steps: int) -> float:
        """Add the gained tokens to every sequence and remove the complete ones. Return the number of tokens gained."""
        running, before = self.running, self.done[self.running]
        kept = survivals(self.trace.acceptance[running], steps, running, before, self.setting)
        length = self.length[running]
        # Sums of expected tokens have rounding errors: a response that lacks 1e-9 of a token is complete.
        after = np.where(before + 1 + kept.sum(1) > length - 1e-9, length, before + 1 + kept.sum(1))
        self.done[running] = after
        self.running = running[after < length]
        ends = Ends(float((after - before).sum()), len(running) - len(self.running))
        self.policy.observe(steps, len(running), kept.sum(0).tolist(), ends)
        return ends.tokens
