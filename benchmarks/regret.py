"""Simulate the scheduler's regret on made-up rollouts, without an engine.

    python benchmarks/regret.py

Rollouts of 64 responses of lognormal lengths, by the made-up costs of small_cpu.py; three of each kind. Regret is
against the best of what `speculation/simulation/replay.py` names as references. The scheduler starts from an acceptance
of 0.7 in all cases. In the second table each response has an acceptance of its own, which goes with its length: a
correlation of -0.7 means that drafts for long responses are seldom kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from small_cpu import CPU

from respec_trainer.speculation.simulation.replay import policy_named, references
from respec_trainer.speculation.simulation.simulator import Outcome, Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace

CANDIDATES, LONGEST, RESPONSES, SEEDS = (0, 1, 2, 3, 5), 1000, 64, range(3)
ALIKE = ((0.0,), (0.2, 0.18, 0.16), (0.35,), (0.45, 0.4, 0.36), (0.6, 0.55, 0.5), (0.75, 0.68, 0.6), (0.9,))
SHARES, CORRELATIONS = (0.4, 0.6, 0.8), (-0.7, 0.0, 0.7)


def main() -> None:
    for acceptance in ALIKE:
        rows = [rollouts(trace_of(seed, acceptance), seed) for seed in SEEDS]
        print(f"acceptance {acceptance}: {describe(rows)}")
    for correlation in CORRELATIONS:
        for share in SHARES:
            rows = [rollouts(trace_of(seed, (share,), correlation), seed) for seed in SEEDS]
            print(f"acceptance {share} on average, correlation {correlation}: {describe(rows)}")


def trace_of(seed: int, acceptance: Sequence[float], correlation: float | None = None) -> Trace:
    """Make a trace; with a correlation, the logarithms of lengths and the log-odds of acceptance are normal."""
    size, own = np.random.default_rng(seed).standard_normal((2, RESPONSES))
    length = np.minimum(np.exp(5 + size).astype(int) + 2, LONGEST)
    rows = np.tile(np.array(acceptance), (RESPONSES, 1))
    if correlation is not None:
        odds = np.log(acceptance[0] / (1 - acceptance[0]))
        rows = 1 / (1 + np.exp(-(odds + 0.9 * (correlation * size + np.sqrt(1 - correlation**2) * own))))[:, None]
    return Trace(np.full(RESPONSES, 50), length, np.arange(RESPONSES), rows)


def rollouts(trace: Trace, seed: int) -> dict[str, Outcome]:
    setting = Setting(slots=RESPONSES, seed=seed)
    makers = {name: policy_named(name, CPU, CANDIDATES, trace, setting) for name in references(CANDIDATES)}
    makers["adaptive"] = policy_named("adaptive", CPU, CANDIDATES, trace, setting, [0.7] * CANDIDATES[-1])
    return {name: simulate(trace, CPU, make, setting) for name, make in makers.items()}


def describe(rows: Sequence[dict[str, Outcome]]) -> str:
    """Regret of the scheduler and of the greedy choice, and how many times as fast the scheduler is as others."""
    names = references(CANDIDATES)
    found: dict[str, list[float]] = {"regret": [], "greedy's": [], "times plain": [], "times the best fixed": []}
    for row in rows:
        best, own = [row[name] for name in names], row["adaptive"].makespan
        found["regret"].append(100 * row["adaptive"].regret(best))
        found["greedy's"].append(100 * row["greedy"].regret(best))
        found["times plain"].append(row["off"].makespan / own)
        found["times the best fixed"].append(min(row[name].makespan for name in names[3:]) / own)
    parts = [f"{name} {min(some):.4g} to {max(some):.4g}" for name, some in found.items()]
    return f"{', '.join(parts)} (regret in %)"


if __name__ == "__main__":
    main()
