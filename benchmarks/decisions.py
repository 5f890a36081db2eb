"""Measure the microseconds of one decision on draft steps, in a loop with a warm processor cache.

    python benchmarks/decisions.py

A decision with nine candidates calls choose, predicted and observe; every batch has another size. Prints the CPU time
of this process: the best and the median of ten rounds. In a live engine a decision takes longer: see `spec/decide_us`
in docs/configuration.md.
"""

from __future__ import annotations

import time
import timeit
from statistics import median

from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import StepTimes
from respec_trainer.speculation.scheduler import DepthScheduler

BATCHES, ROUNDS = 256, 10
# Seconds of a small model on two cores; the time of a decision does not depend on them.
COSTS = CostModel(
    {
        "plain": Terms(fixed=0.010, weights=0.034, kv=4e-7, token=8e-4),
        "draft": Terms(fixed=0.002, each=5e-5, weights=0.003, kv=3e-8, token=1e-4),
        "verify": Terms(fixed=0.012, each=1e-4, weights=0.034, kv=5e-7, token=5e-4, pair=2e-8),
        "extend": Terms(fixed=0.002, each=3e-5, weights=0.003, kv=3e-8, token=1e-4, pair=1e-8),
        "catch_up": Terms(fixed=0.003, token=9e-5, pair=1e-8),
        "prefill": Terms(fixed=0.040, token=6e-4, pair=2e-8),
    }
)


def main() -> None:
    scheduler = DepthScheduler(StepTimes(COSTS, list(range(9)), BATCHES, 32_768), (0.8, 0.75, 0.7, 0.65, 0.6), 0.005)

    def decide() -> None:
        for batch in range(1, BATCHES + 1):
            steps = scheduler.choose(batch, 100.0 * batch, 30.0)
            scheduler.predicted()
            scheduler.observe(steps, batch, [batch // 2] * steps)

    rounds = timeit.repeat(decide, timer=time.process_time, number=1, repeat=ROUNDS)
    best, middle = (1e6 * seconds / BATCHES for seconds in (min(rounds), median(rounds)))
    print(f"a decision takes {best:.1f} us, in the median {middle:.1f} us")


if __name__ == "__main__":
    main()
