"""Length traces: lengths and acceptance of a step's responses, for replay by `tools/simulate_rollout.py`."""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.simulation.trace import TraceRow
from respec_trainer.telemetry.timeline import Timeline, acceptance_by_depth, steps_used


def trace_rows(samples: Sequence[Sample], group_size: int, timelines: Sequence[Timeline] = ()) -> list[TraceRow]:
    """A row for each sample with a response, in order; each `group_size` consecutive samples share their prompt.

    A response's own histogram gives its acceptance only if all its passes drafted equally deep. If the draft steps
    changed, each row has the acceptance of the whole phase. Without drafts the rows have none, and a replay needs a
    default.
    """
    # A response that was cut off before its first token has nothing to replay.
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
    """Add the entry of one accepted draft, 0, which sglang leaves out if no pass accepted any draft."""
    return histogram + [0] * (2 - len(histogram))
