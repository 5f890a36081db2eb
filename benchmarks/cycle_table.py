"""CycleTable: what a cycle took with each number of draft steps, by batch and context, from logs of fixed choices.

Nothing here is fitted: times are medians of what was measured, gains are counted. So a wrong cost model, by which a
policy chooses, shows as regret.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

import numpy as np

from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.policy import FixedPolicy, index_of, middle_of
from respec_trainer.speculation.shape import Shape
from respec_trainer.speculation.simulation.informed import InformedPolicy
from respec_trainer.speculation.simulation.simulator import Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace

Place = tuple[int, int]  # policy.index_of the sequences, and of their mean context
NEAR = 0.25  # a place within this distance (`nearest`) counts as measured
SEEDS = 8  # simulated rollouts of each policy, whose mean counts


def cycles(log: DecodeLog) -> np.ndarray:
    """Return the seconds of each batch's cycle without changes of the steps [N]; NaN where they were not measured.

    A cycle lasts until the next batch starts, which must be a decode batch too.
    """
    measured = ~log.prefill & np.append(~log.prefill[1:], False)
    return np.where(measured, log.period - log.catch_up - log.switch, np.nan)


class CycleTable:
    """Medians by place, of the places at which every candidate was measured. Has the methods of costs in simulations.

    Raises ValueError if there is no such place. `logs`: of each fixed number of steps, by that number.
    """

    def __init__(self, logs: Mapping[int, Sequence[DecodeLog]]):
        self.candidates = tuple(sorted(logs))
        found: dict[Place, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for steps, log in ((steps, log) for steps, some in logs.items() for log in some):
            rows = zip(log.batch, log.context, log.steps, cycles(log), strict=True)
            for batch, context, taken_steps, seconds in rows:
                if taken_steps == steps and not np.isnan(seconds):
                    found[index_of(int(batch)), index_of(int(context))][steps].append(float(seconds))
        whole = {place: row for place, row in found.items() if set(row) == set(self.candidates)}
        if not whole:
            raise ValueError(f"no batch size and context was measured with each of {list(self.candidates)} steps")
        self.seconds = {place: [median(row[steps]) for steps in self.candidates] for place, row in whole.items()}
        self._places = list(self.seconds)
        self._logs = np.log([[middle_of(index) for index in place] for place in self._places])

    def nearest(self, batch: float, context: float) -> tuple[Place, float]:
        """Return the nearest place, and its distance: the logarithms of the ratios of batch and context, added.

        Both count as the middles of all that share their index.
        """
        here = np.log([middle_of(index_of(int(each))) for each in (batch, context)])
        apart = np.abs(self._logs - here).sum(1)
        best = int(apart.argmin())
        return self._places[best], float(apart[best])

    def at(self, batch: float, context: float) -> list[float]:
        """Return the seconds of each candidate's cycle at the nearest place."""
        return self.seconds[self.nearest(batch, context)[0]]

    def covered(self, log: DecodeLog) -> float:
        """Return the share of the decode batches that are near a place."""
        rows = np.flatnonzero(~log.prefill)
        return fmean(self.nearest(log.batch[row], log.context[row])[1] <= NEAR for row in rows)

    # Costs, as `simulate` calls them. Prompts take as long with every policy, and switching is free in references.

    def has(self, _piece: str) -> bool:
        return False

    def switch_seconds(self) -> float:
        return 0.0

    def cycle_seconds(self, shape: Shape, batch: float, context: float) -> float:
        return self.at(batch, context)[self.candidates.index(shape.steps)]


class Replayed(FixedPolicy):
    """Chooses as a rollout did when its responses had as many tokens as now."""

    def __init__(self, log: DecodeLog):
        rows = ~log.prefill
        self.taken, self.before = log.steps[rows], np.cumsum(log.tokens[rows]) - log.tokens[rows]
        self.tokens = 0.0

    def choose(self, batch: int, context: float, missed: float) -> int:
        return int(self.taken[np.searchsorted(self.before, self.tokens, side="right") - 1])

    def observe(self, steps: int, batch: int, survivors: Sequence[float], ends: Ends) -> None:
        self.tokens += ends.tokens


def mean_seconds(table: CycleTable, trace: Trace, make: Callable[[], FixedPolicy]) -> float:
    """Return the seconds of decoding `trace` with a policy by the table's times: the mean of some draws of drafts."""
    settings = [Setting(slots=len(trace), seed=seed) for seed in range(SEEDS)]
    return fmean(simulate(trace, table, make, setting).makespan for setting in settings)


def references(table: CycleTable, trace: Trace) -> dict[str, float]:
    """Return the seconds of decoding `trace` by each policy that regret is measured against.

    They are those of `speculation/simulation/replay.py`.
    """
    makers = {kind: InformedPolicy(kind, table, table.candidates) for kind in ("greedy", "weighted", "critical")}
    makers |= {f"s={steps}": FixedPolicy(steps) for steps in table.candidates}
    return {name: mean_seconds(table, trace, lambda policy=policy: policy) for name, policy in makers.items()}


def spent(table: CycleTable, trace: Trace, log: DecodeLog) -> float:
    """Return the seconds of a rollout's choices, with the log's own catching up and switching.

    The choices are simulated like the references, with the same draws: how many passes the last response needs is luck,
    which differs more between rollouts than policies do.
    """
    rows = ~log.prefill
    changes = log.catch_up[rows].sum() + log.switch[rows].sum()
    return mean_seconds(table, trace, lambda: Replayed(log)) + float(changes)


def regrets(
    fixed: Mapping[int, Sequence[DecodeLog]], logs: Mapping[str, Sequence[DecodeLog]], trace: Trace
) -> dict[str, list[tuple[float, float]]]:
    """Return (regret, share of batches that are covered) of each round, for each arm.

    The rounds with even numbers are judged by the table of the odd ones, and the other way round, so that no noise is
    on both sides. Raises ValueError with fewer than two rounds.

    Args:
        fixed: the logs of all rounds for each fixed number of steps.
        logs: of each arm, one a round.
    """
    if any(len(some) < 2 for some in (*fixed.values(), *logs.values())):
        raise ValueError("regret needs two rounds: one is judged by the times of the other")
    halves = [CycleTable({steps: some[half::2] for steps, some in fixed.items()}) for half in (0, 1)]
    best = [min(references(table, trace).values()) for table in halves]

    def judged(number: int, log: DecodeLog) -> tuple[float, float]:
        other = 1 - number % 2
        return spent(halves[other], trace, log) / best[other] - 1, halves[other].covered(log)

    return {arm: [judged(*numbered) for numbered in enumerate(some)] for arm, some in logs.items()}
