"""DepthScheduler: how many draft steps each decode batch takes, from what the batches before it showed.

The same object runs inside the engine and in the simulator. It hangs on counts and on the cost model only, never on a
clock: the ranks of a tensor-parallel engine each have one, and must choose alike.

    scheduler = DepthScheduler.of(settings)
    steps = scheduler.choose(batch, context, missed)      # before every decode batch
    scheduler.observe(steps, batch, survivors)            # after it

Acceptance is estimated by depth. A draft does not hang on how many follow it, so all candidates share one estimate,
and a candidate's is what its depths come to. Depths that are not drafted are not seen: now and then the scheduler
tries a deeper candidate, or speculation where there is none, for a few batches (`_try`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.speculation.acceptance import AcceptanceEstimate
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.policy import AdaptivePolicy, StepTimes, tokens_by_steps

PRIOR = 2.0  # drafts that the prior counts for: the first batch is to say more
HOPE = 0.95  # acceptance that a depth which is not drafted may have come to
EVIDENCE = 16  # drafts at a new depth that a try is to show
FEWEST = 4  # batches it lasts at least, unless it shows them in fewer
STALE = 50  # decode batches in which a depth was not drafted, before it is tried again
AGED = 4.0  # drafts that an estimate which has not been seen for long still counts for
LONGEST = 4.0  # decode batches' time that a try may cost at most, so that no rollout notices it


class DepthScheduler:
    """See above. `of` makes one; raises ConfigError where the settings give no costs or no prior."""

    informed = False

    def __init__(self, times: StepTimes, prior: Sequence[float], explore: float = 0.0):
        self.times, self.candidates, self.explore = times, times.candidates, explore
        self.policy = AdaptivePolicy(times)
        missing = max(self.candidates) - len(prior)
        self.estimate = AcceptanceEstimate([*prior, *[prior[-1]] * missing], prior_drafts=PRIOR)
        self.tokens = self._expected()
        self.seen = 0  # depths that were ever drafted; the prior says nothing of those behind them any more
        self.earned = 0.0  # seconds by the cost model that a try may cost
        self.trying = 0  # batches left of one
        self.unseen = [STALE] * max(self.candidates)  # decode batches since a draft at each depth
        self._predicted = 1.0

    @classmethod
    def of(cls, settings: DepthSettings) -> DepthScheduler:
        if not settings.costs or not settings.prior:
            raise ConfigError("steps are chosen by costs and a prior acceptance: give both in DepthSettings")
        costs = CostModel.of_tuples(settings.costs)
        times = StepTimes(costs, settings.candidates, settings.max_batch, settings.max_context)
        return cls(times, settings.prior, settings.explore)

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Draft steps for `batch` sequences of `context` tokens on average, 0 for plain decoding.

        `missed` is the mean number of tokens of a sequence that its drafter has not read.
        """
        taken = self.times.at(batch, context)
        if self.trying:
            self.trying -= not missed  # an engine may catch up over several batches, which draft nothing yet
            place = self.policy.current
        else:
            place = self.policy.choose(batch, context, missed, self.tokens)
            if self.explore and self._try(place, batch, context, missed):
                place = self.policy.current
        self.earned += self.explore * taken[place]
        self.unseen = [0 if d < self.candidates[place] else unseen + 1 for d, unseen in enumerate(self.unseen)]
        self._predicted = self.tokens[place] * taken[0] / taken[place] if self.candidates[0] == 0 else 0.0
        return self.candidates[place]

    def observe(self, steps: int, batch: int, survivors: Sequence[int]) -> None:
        """What came of a batch of `steps` drafts: survivors[d] sequences kept at least d + 1; none for steps=0."""
        if steps:
            self.estimate.observe([batch, *survivors])
            self.seen = max(self.seen, steps)
            self.estimate.follow(self.seen)
            self.tokens = self._expected()

    def predicted(self) -> float:
        """Speed-up over plain decoding that it expects of the latest choice; 0 where plain is no candidate."""
        return self._predicted

    def state(self) -> dict[str, Any]:
        """What it has learnt, and what it is about; JSON. One made alike chooses alike after `load_state`."""
        return {
            "candidates": list(self.candidates),
            "acceptance": self.estimate.state(),
            "seen": self.seen,
            "unseen": list(self.unseen),
            "earned": self.earned,
            "trying": self.trying,
            "current": self.policy.current,
            "lost": list(self.policy.lost),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from another's `state`; one of other candidates leaves what was learnt of acceptance, and no more."""
        self.estimate.load_state(state["acceptance"])
        self.tokens = self._expected()
        self.seen = min(state["seen"], max(self.candidates))
        if state["candidates"] == list(self.candidates):
            self.unseen, self.earned, self.trying = list(state["unseen"]), state["earned"], state["trying"]
            self.policy.current, self.policy.lost = state["current"], list(state["lost"])

    def _expected(self) -> list[float]:
        """Tokens a sequence gains by each candidate; worked out when an estimate changes, and not for every choice."""
        return tokens_by_steps(self.candidates, self.estimate.by_depth)

    def _try(self, place: int, batch: int, context: float, missed: float) -> bool:
        """Begin to try the next deeper candidate that would pay if its new depths were accepted as well as can be.

        What that costs is counted as if none of the new drafts were kept, and the drafter's catching up with it. It
        must have been earned, as a share `explore` of the time. Only where a rollout begins, whose sequences the
        drafter has read so far, it may be earned afterwards: once a large batch has gone on without, catching up would
        cost too much. So all tries together cost no more than that share and one try. A try that fails ends by the
        policy's own choice, for which going back is cheap.
        """
        steps, acceptance = self.candidates[place], self.estimate.by_depth
        if not self.unseen[steps:] or self.unseen[steps] < STALE:
            return False
        taken = self.times.at(batch, context)
        hoped = [*acceptance[:steps], *(max(HOPE, a) for a in acceptance[steps:])]
        tokens = tokens_by_steps(self.candidates, hoped)
        reaching = batch * math.prod(acceptance[:steps])  # sequences that come to draft at the new depth
        most, price = LONGEST * taken[place], self.times.switch
        price += 0.0 if steps else self.times.catch_up(batch, context, missed)
        self.earned = min(self.earned, most)
        fresh = not steps and not missed and self.earned >= 0
        allowed = (most if fresh else self.earned) - price
        for deeper in range(place + 1, len(self.candidates)):
            if taken[deeper] / tokens[deeper] >= taken[place] / tokens[place]:
                continue
            extra = max(taken[deeper] - taken[place], 1e-9)
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
