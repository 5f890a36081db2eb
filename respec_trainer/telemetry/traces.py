"""Length traces: what a step's responses were, as `tools/simulate_rollout.py` replays them."""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.simulation.trace import TraceRow
from respec_trainer.telemetry.timeline import Timeline, acceptance_by_depth, steps_used


def trace_rows(samples: Sequence[Sample], group_size: int, timelines: Sequence[Timeline] = ()) -> list[TraceRow]:
    """A row for each sample, in order; `group_size` samples next to each other share their prompt.

    A response's own histogram tells its acceptance only if all its passes drafted equally deep. Where the steps changed
    the acceptance is that of the whole phase. Without any drafts the rows have none: a replay needs a default then.
    """
    # A response that was cut off before its first token leaves nothing to replay.
    numbered = [(index // group_size, sample) for index, sample in enumerate(samples) if sample.response_ids]
    used = steps_used(timelines)
    acceptance, own = None, False
    if len(used) > 1 or 0 in used:
        acceptance = acceptance_by_depth(timelines) or None
    else:
        own = any(sample.verify_count for sample in samples)
    return [
        TraceRow(
            prompt_tokens=len(sample.prompt_ids),
            response_tokens=len(sample.response_ids),
            group=group,
            acceptance=acceptance,
            accept_histogram=_from_one_draft(sample.accept_histogram) if own else None,
        )
        for group, sample in numbered
    ]


def _from_one_draft(histogram: list[int]) -> list[int]:
    """With the zero of one draft, which sglang leaves out where no pass kept any, though all had drafted."""
    return histogram + [0] * (2 - len(histogram))
