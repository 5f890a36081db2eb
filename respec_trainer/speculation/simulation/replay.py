"""Replay a rollout under several policies, chosen by name, and show the results as a table or as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import get_args

from rich.table import Table

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.policy import FixedPolicy, StepTimes, ThresholdPolicy
from respec_trainer.speculation.profiling.profile import Profile
from respec_trainer.speculation.scheduler import DepthScheduler
from respec_trainer.speculation.simulation.informed import InformedPolicy, Kind
from respec_trainer.speculation.simulation.simulator import Outcome, Setting, SimulatedPolicy, simulate
from respec_trainer.speculation.simulation.trace import Trace


def candidates_of(profile: Profile) -> list[int]:
    """Return the draft steps to choose from: 0 and those of the profile's chains."""
    return [0, *(shape.steps for shape in profile.shapes() if shape.is_chain)]


def references(candidates: Sequence[int]) -> list[str]:
    """Return the names of the policies whose fastest is what regret is measured against: none of them is a bound."""
    return [*get_args(Kind), *("off" if steps == 0 else f"s={steps}" for steps in candidates)]


def policy_named(
    name: str,
    costs: CostModel,
    candidates: Sequence[int],
    trace: Trace,
    setting: Setting,
    prior: Sequence[float] | None = None,
) -> Callable[[], SimulatedPolicy]:
    """Return a maker of the policy "adaptive", "off", "s=K", "s=K<=B", which is off above B sequences, or of an
    InformedPolicy: "greedy", "weighted" or "critical".

    "adaptive" is the engine's own scheduler. It starts from the acceptance `prior`, such as that of the last rollout;
    default: the trace's mean. Raises ConfigError for any other name.
    """
    if name == "adaptive":
        longest = int((trace.prompt + trace.length).max())
        times = StepTimes(costs, candidates, min(setting.slots, len(trace)), longest)
        return lambda: DepthScheduler(times, prior or trace.mean_acceptance(), DepthSettings.explore)
    if name in get_args(Kind):
        return lambda: InformedPolicy(name, costs, candidates)
    fixed = re.fullmatch(r"s=(\d+)(?:<=(\d+))?", "s=0" if name == "off" else name)
    if not fixed:
        known = ", ".join(("adaptive", "off", *get_args(Kind)))
        raise ConfigError(f"no policy {name!r}: choose {known}, s=K or s=K<=B, such as s=3<=16")
    steps = int(fixed[1])
    if steps not in candidates:
        raise ConfigError(f"policy {name}: the profile has chains of steps {list(candidates)[1:]} only")
    return lambda: ThresholdPolicy(steps, int(fixed[2])) if fixed[2] else FixedPolicy(steps)


def compare(
    trace: Trace, costs: CostModel, candidates: Sequence[int], name: str, setting: Setting
) -> dict[str, Outcome]:
    """Simulate a policy and all references; return the outcomes by name."""
    names = dict.fromkeys((name, *references(candidates)))
    return {
        each: simulate(trace, costs, policy_named(each, costs, candidates, trace, setting), setting) for each in names
    }


def as_data(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float | int | list[str]]]:
    """Return the numbers of the table for each policy of a result of `compare`. Regret is against the fastest."""
    fixed = [name for name in outcomes if name == "off" or re.fullmatch(r"s=\d+", name)]
    best = [outcomes[name] for name in (*get_args(Kind), *fixed)]
    return {
        name: {
            "makespan": outcome.makespan,
            "tokens": outcome.tokens,
            "tokens_per_second": outcome.tokens_per_second,
            "speedup": outcomes["off"].makespan / outcome.makespan,
            "regret": outcome.regret(best),
            "off_fraction": outcome.off_fraction,
            "mean_batch": outcome.mean_batch,
            "accept_length": outcome.accept_length,
            "switches": outcome.switches,
            "not_counted": list(outcome.not_counted),
        }
        for name, outcome in outcomes.items()
    }


def render_outcomes(outcomes: dict[str, Outcome]) -> Table:
    rows = as_data(outcomes)
    missing = next(iter(outcomes.values())).not_counted
    caption = f"not in the profile, and taken to cost nothing: {', '.join(missing)}" if missing else None
    view = Table(caption=caption)
    for name in ("policy", "seconds", "tokens/s", "speed-up", "regret", "off", "batch", "accept", "switches"):
        view.add_column(name, justify="left" if name == "policy" else "right")
    for name, row in rows.items():
        view.add_row(
            name,
            f"{row['makespan']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.3f}",
            f"{row['regret']:.1%}",
            f"{row['off_fraction']:.0%}",
            f"{row['mean_batch']:.1f}",
            f"{row['accept_length']:.2f}",
            str(row["switches"]),
        )
    return view


def parse_acceptance(text: str | None) -> list[float] | None:
    """Parse text such as "0.8,0.7". Raises ConfigError if it is not a list of probabilities."""
    if text is None:
        return None
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value <= 1 for value in values):
        raise ConfigError(f"acceptance {text!r} is not a list of probabilities such as 0.8,0.7")
    return values
