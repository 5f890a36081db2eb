"""The summary at the end of a run: rise of the reward, speed of the rollouts, path of the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60
LOSSY = "lossy speculation: responses do not follow the policy"
# Number of steps averaged at the start and at the end of the run: one step's mean reward is noisy.
END_STEPS = 5


def reward_rise(steps: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The mean reward over the first and over the last few steps; NaN if every sample of every step was skipped."""
    rewards = rewards_of(steps) or [math.nan]
    ends = max(1, min(END_STEPS, len(rewards) // 2))
    return fmean(rewards[:ends]), fmean(rewards[-ends:])


def rewards_of(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """The mean reward of each step that has one; steps whose samples were all skipped have none."""
    return [step["reward/mean"] for step in steps if "reward/mean" in step]


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Draw values as one line of bars, averaged to at most `width` columns and scaled to the range of the values."""
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[1 + round((value - low) / span * (len(BARS) - 2))] for value in values)


def mismatch(steps: Sequence[Mapping[str, Any]]) -> str:
    """The mean and the largest divergence of the actor from the sampler, as text; refused steps have none."""
    values = [step["mismatch/kl"] for step in steps if "mismatch/kl" in step]
    return f"{fmean(values):.2g}, at most {max(values):.2g} in a step" if values else "not measured"


def speculation_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines for engines that choose their draft steps: the speed-up, and a warning if the choice failed."""
    lines = []
    if any("spec/achieved_speedup" in step for step in steps):
        words = [f"{_by_time(steps, 'spec/achieved_speedup'):.2f}x plain decoding"]
        if any("spec/predicted_speedup" in step for step in steps):
            words.append(f"predicted {_by_time(steps, 'spec/predicted_speedup'):.2f}x")
        lines.append(f"speculation   {', '.join(words)}; off {_by_time(steps, 'spec/off_fraction'):.0%} of the time")
    failed = [index for index, step in enumerate(steps, 1) if step.get("spec/chooser_failures")]
    if failed:
        lines.append(f"warning       speculation was turned off: the depth chooser failed in step {failed[0]}")
    return lines


def _by_time(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a metric over the steps that have it, weighted by their generation time."""
    known = [step for step in steps if name in step]
    return fmean((step[name] for step in known), [step["time/generate"] for step in known])


def print_summary(steps: Sequence[Mapping[str, Any]], folder: Path, console: Console | None = None) -> None:
    """Print the summary of a finished run's steps."""
    console = console or Console()
    if not steps:
        console.print(f"No step was completed. The run's folder is {folder}")
        return
    first, last = reward_rise(steps)
    tokens = sum(step["rollout/tokens"] for step in steps)
    generate, total = (sum(step[key] for step in steps) for key in ("time/generate", "time/step"))
    lines = [
        f"reward        {first:.3f} -> {last:.3f}  ({last - first:+.3f})",
        f"              {curve(rewards_of(steps) or [0.0])}",
        f"rollouts      {tokens / generate:,.0f} tokens/s over {tokens:,} tokens; {generate / total:.0%} of the time",
        f"accept length {fmean(step['spec/accept_length'] for step in steps):.2f}",
        *speculation_lines(steps),
        f"mismatch kl   {mismatch(steps)}",
        *([f"warning       {LOSSY}"] if any(step.get("spec/lossy") for step in steps) else []),
        f"time          {total:.0f} s for {len(steps)} steps",
        f"run           {folder}",
    ]
    if restarts := sum(step.get("engine/restarts", 0) for step in steps):
        lost = sum(step["engine/lost_tokens"] for step in steps)
        lines.insert(-1, f"restarts      {restarts} of rollout engines; {lost:,} tokens drawn again")
    console.print(Panel(Group(*(Text(line) for line in lines)), title="summary", title_align="left", expand=False))
