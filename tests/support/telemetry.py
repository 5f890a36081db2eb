"""Samples and decode logs that are small enough to compute their metrics by hand."""

from __future__ import annotations

import numpy as np

from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED, Sample
from respec_trainer.telemetry.timeline import Timeline


def sample(reward=0.0, tokens=4, verify=0, histogram=(), finish="stop") -> Sample:
    """A response of `tokens` tokens. Its passes kept as many drafts as `histogram` says, the fewest first."""
    passes = [[ACCEPTED] * depth + [BONUS] for depth, count in enumerate(histogram) for _ in range(count)]
    origins = [UNDRAFTED, *(origin for run in passes for origin in run), *[UNDRAFTED] * tokens]
    return Sample(
        key="0:a:0",
        prompt_ids=[1],
        response_ids=list(range(tokens)),
        sampler_logprobs=[-1.0] * tokens,
        finish_reason=finish,
        actor_version="actor-0",
        drafter_version="drafter-0",
        verify_count=verify,
        accept_histogram=list(histogram),
        origins=origins[:tokens],
        reward=reward,
    )


def plain_seconds(batch: np.ndarray, context: np.ndarray) -> np.ndarray:
    return 0.1 * batch + 0.01 * context


def hand_log(**changes) -> DecodeLog:
    """A log of a prefill, two decode batches, another prefill and two decode batches: 5 s of decoding in all."""
    columns = {
        "start": [0.0, 1.0, 2.0, 5.0, 5.5, 6.0],
        "prefill": [True, False, False, True, False, False],
        "batch": [4, 4, 4, 1, 2, 2],
        "context": [9.0, 10.0, 10.0, 9.0, 20.0, 20.0],
        "steps": [0, 2, 0, 0, 1, 1],
        "tokens": [36, 10, 4, 9, 3, 4],
        "survivors": [[0, 0], [4, 2], [0, 0], [0, 0], [1, 0], [2, 0]],
        "draft": [0.0, 0.2, 0.0, 0.0, 0.1, 0.1],
        "verify": [0.9, 0.7, 2.9, 0.4, 0.1, 0.35],
        "extend": [0.1, 0.05, 0.0, 0.1, 0.05, 0.05],  # the parts of the last batch take 0.5 s
        "catch_up": [0.0, 0.0, 0.0, 0.0, 0.25, 0.0],
        "caught_up": [0, 0, 0, 0, 2, 0],
        "switch": [0.0] * 6,
        "decide": [0.5, 1e-5, 2e-5, 0.5, 3e-5, 0.0],
        "predicted": [0.0, 1.5, 1.0, 0.0, 0.0, 2.0],
    }
    arrays = {name: np.array(values) for name, values in (columns | changes).items()}
    return DecodeLog(**arrays)


def hand_timeline(**changes) -> Timeline:
    return Timeline.of(hand_log(**changes), plain_seconds)
