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

from small_cpu import CPU

from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.policy import StepTimes
from respec_trainer.speculation.scheduler import DepthScheduler

BATCHES, ROUNDS = 256, 10


def main() -> None:
    scheduler = DepthScheduler(StepTimes(CPU, list(range(9)), BATCHES, 32_768), (0.8, 0.75, 0.7, 0.65, 0.6), 0.005)

    def decide() -> None:
        for batch in range(1, BATCHES + 1):
            steps = scheduler.choose(batch, 100.0 * batch, 30.0)
            scheduler.predicted()
            scheduler.observe(steps, batch, [batch // 2] * steps, Ends(batch + batch // 2 * steps, 0))

    rounds = timeit.repeat(decide, timer=time.process_time, number=1, repeat=ROUNDS)
    best, middle = (1e6 * seconds / BATCHES for seconds in (min(rounds), median(rounds)))
    print(f"a decision takes {best:.1f} us, in the median {middle:.1f} us")


if __name__ == "__main__":
    main()
