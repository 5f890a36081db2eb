"""DepthScheduler: chooses the draft steps of each decode batch from the results of the batches before it.

The same object runs inside the engine and in the simulator. It depends on counts and on the cost model only, never on a
clock: each rank of a tensor-parallel engine has its own scheduler, and all of them must choose the same steps.

    scheduler = DepthScheduler.of(settings)
    steps = scheduler.choose(batch, context, missed)      # before every decode batch
    scheduler.observe(steps, batch, survivors, ends)      # after it

Acceptance is estimated by depth. Whether a draft is kept does not depend on how many drafts follow it, so all
candidates share one estimate, and the expected tokens of a candidate follow from its depths. Depths that are not
drafted are not observed: from time to time the scheduler tries a deeper candidate for a few batches, or speculation
where it is off (`_try`). Tokens behind the ends of responses are not counted as gained (`endings.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.acceptance import AcceptanceEstimate
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.endings import Endings, tokens_beyond
from respec_trainer.speculation.policy import AdaptivePolicy, StepTimes

PRIOR = 2.0  # weight of the prior, in drafts: small, so that the first batch outweighs it
HOPE = 0.95  # acceptance that a depth may have reached while it was not drafted
EVIDENCE = 16  # drafts at the new depth that a try should observe
FEWEST = 4  # least batches of a try, unless fewer give that many drafts
STALE = 50  # decode batches without a draft at a depth before it is tried again
AGED = 4.0  # weight, in drafts, of the estimates at depths that have not been drafted for long
LONGEST = 4.0  # most that a try may cost, in times of a decode batch: negligible for a rollout


class DepthScheduler:
    """Chooses draft steps; see the module's text. `of` makes one from DepthSettings."""

    def __init__(self, times: StepTimes, prior: Sequence[float], explore: float = 0.0):
        self.times, self.candidates, self.explore = times, times.candidates, explore
        self.policy = AdaptivePolicy(times)
        missing = max(self.candidates) - len(prior)
        self.estimate = AcceptanceEstimate([*prior, *[prior[-1]] * missing], prior_drafts=PRIOR)
        self.endings = Endings()
        self.tokens = self._expected(self.estimate.by_depth)
        self.seen = 0  # depths that were ever drafted; deeper estimates follow the last of them, not the prior
        self.earned = 0.0  # seconds by the cost model that a try may cost
        self.trying = 0  # batches left of the current try
        self.unseen = [STALE] * max(self.candidates)  # decode batches since a draft at each depth
        self._predicted = 1.0

    @classmethod
    def of(cls, settings: DepthSettings) -> DepthScheduler:
        """Make the scheduler of an engine. Raises ConfigError if the settings have no costs or no prior."""
        if not settings.costs or not settings.prior:
            raise ConfigError("steps are chosen by costs and a prior acceptance: give both in DepthSettings")
        costs = CostModel.of_tuples(settings.costs, settings.graph_sizes)
        times = StepTimes(costs, settings.candidates, settings.max_batch, settings.max_context)
        return cls(times, settings.prior, settings.explore)

    def set_graph_sizes(self, sizes: Sequence[int]) -> None:
        """Take the batch sizes of the engine's own CUDA graphs in place of those of the profile's engine."""
        self.times = self.policy.times = self.times.with_graphs(sizes)

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Return the draft steps for `batch` sequences of `context` tokens on average, 0 for plain decoding.

        `missed` is the mean number of tokens of a sequence that its drafter has not read.
        """
        taken = self.times.at(batch, context)
        if self.trying:
            self.trying -= not missed  # an engine may catch up over several batches, which draft nothing yet
            index = self.policy.current
        else:
            index = self.policy.choose(batch, context, missed, self.tokens)
            if self.explore and self._try(index, batch, context, missed):
                index = self.policy.current
        self.earned += self.explore * taken[index]
        self.unseen = [0 if d < self.candidates[index] else unseen + 1 for d, unseen in enumerate(self.unseen)]
        self._predicted = self.tokens[index] * taken[0] / taken[index] if self.candidates[0] == 0 else 0.0
        return self.candidates[index]

    def observe(self, steps: int, batch: int, survivors: Sequence[float], ends: Ends | None = None) -> None:
        """Add the outcome of a batch of `batch` running sequences.

        Args:
            survivors: survivors[d] of them kept at least d + 1 of `steps` drafts; empty for steps=0.
            ends: what their responses kept; None: all of it, and no response ended.
        """
        if ends is not None:
            beyond = tokens_beyond(steps, self.estimate.by_depth) if ends.ended else 0.0
            self.endings.observe(batch + sum(survivors), ends, beyond)
        if steps:
            self.estimate.observe([batch, *survivors])
            self.seen = max(self.seen, steps)
            self.estimate.follow(self.seen)
        self.tokens = self._expected(self.estimate.by_depth)

    def predicted(self) -> float:
        """Return the predicted speed-up of the latest choice over plain decoding; 0 if plain is not a candidate."""
        return self._predicted

    def state(self) -> dict[str, Any]:
        """Return the state as JSON data. With the same settings another scheduler chooses alike after `load_state`."""
        return {
            "candidates": list(self.candidates),
            "acceptance": self.estimate.state(),
            "endings": self.endings.state(),
            "seen": self.seen,
            "unseen": list(self.unseen),
            "earned": self.earned,
            "trying": self.trying,
            "current": self.policy.current,
            "lost": list(self.policy.lost),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the `state` of another scheduler; only its estimates if that had other candidates.

        A state of a version that did not estimate ends begins with none seen.
        """
        self.estimate.load_state(state["acceptance"])
        self.endings.load_state(state.get("endings", {}))
        self.tokens = self._expected(self.estimate.by_depth)
        self.seen = min(state["seen"], max(self.candidates))
        if state["candidates"] == list(self.candidates):
            self.unseen, self.earned, self.trying = list(state["unseen"]), state["earned"], state["trying"]
            self.policy.current, self.policy.lost = state["current"], list(state["lost"])

    def _expected(self, acceptance: Sequence[float]) -> list[float]:
        """Expected tokens that a response keeps of a cycle of each candidate. Computed only when estimates change."""
        return self.endings.kept_by_steps(self.candidates, acceptance)

    def _try(self, index: int, batch: int, context: float, missed: float) -> bool:
        """Start to try the next deeper candidate that would pay if nearly all drafts at its new depths were accepted.

        The cost of a try is computed as if none of the new drafts were kept, and includes the drafter's catch-up. The
        budget for it grows by the share `explore` of the decoding time. A try may overdraw this budget only at the
        start of a rollout, when the drafter has read all tokens: later, in a large batch, a catch-up would cost too
        much. So all tries together cost at most that share of the time and one try more. After a try that fails the
        policy itself changes back, which is cheap.

        Args:
            index: of the current candidate.
        """
        steps, acceptance = self.candidates[index], self.estimate.by_depth
        if not self.unseen[steps:] or self.unseen[steps] < STALE:
            return False
        taken = self.times.at(batch, context)
        hoped = [*acceptance[:steps], *(max(HOPE, a) for a in acceptance[steps:])]
        tokens = self._expected(hoped)
        reaching = batch * math.prod(acceptance[:steps])  # sequences expected to reach the new depth
        most, price = LONGEST * taken[index], self.times.switch
        price += 0.0 if steps else self.times.catch_up(batch, context, missed)
        self.earned = min(self.earned, most)
        fresh = not steps and not missed and self.earned >= 0
        allowed = (most if fresh else self.earned) - price
        for deeper in range(index + 1, len(self.candidates)):
            if taken[deeper] / tokens[deeper] >= taken[index] / tokens[index]:
                continue
            extra = max(taken[deeper] - taken[index], 1e-9)
            needed = math.ceil(EVIDENCE / reaching) if reaching * LONGEST > 1 else EVIDENCE
            batches = min(needed, int(max(allowed, 0.0) / extra))
            if batches < min(needed, FEWEST):
                return False
            self.earned -= price + batches * extra
            self.trying = batches - 1
            self.estimate.age(steps, AGED)
            self.policy.change(deeper)
            return True
        return False
