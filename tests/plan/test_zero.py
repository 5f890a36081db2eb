"""plan/zero.py: the table of its docstring, written out. Against DeepSpeed: tests/integration/plan/test_actor.py."""

from __future__ import annotations

import pytest

from respec_trainer.plan.zero import ZeroSizes

P, DP, LARGEST, BUCKET = 10**10 + 1, 4, 10**8, 50_000_000
SHARE = 2_500_000_001  # of 10,000,000,001 numbers over 4 ranks, rounded up


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_parts_are_those_of_the_table(stage, width):
    zero = ZeroSizes(P, width, DP, stage, LARGEST)
    assert zero.share == SHARE and ZeroSizes(P, width, 1, stage, LARGEST).share == P
    assert zero.weights == width * (SHARE if stage == 3 else P)
    assert zero.optimizer == 12 * SHARE
    sums = {1: 4 * P, 2: 4 * SHARE, 3: 4 * SHARE + width * BUCKET}
    assert zero.gradients == sums[stage]
    own = 2 * P if width == 2 else 4 * SHARE
    more = {1: own, 2: 4 * SHARE + width * (LARGEST + BUCKET), 3: 4 * SHARE + width * (LARGEST + 1_000_000_000)}
    assert zero.update == more[stage]


def test_a_model_smaller_than_what_may_be_gathered_is_gathered_whole():
    assert ZeroSizes(1000, 2, 1, 3, 10).update == 4 * 1000 + 2 * (10 + 1000)


@pytest.mark.parametrize(
    ("stage", "dp", "weights", "optimizer", "gradients", "update"),
    [
        (1, 4, "2 bytes each", "ZeRO-1: 12 bytes each / dp 4", "4 bytes each", "own gradients"),
        (2, 4, "2 bytes each", "ZeRO-2: 12 bytes each / dp 4", "4 bytes each / dp 4", "bucket, second sum"),
        (
            3,
            4,
            "2 bytes each / dp 4",
            "ZeRO-3: 12 bytes each / dp 4",
            "4 bytes each / dp 4, a bucket",
            "second sum, gathered weights",
        ),
        (1, 1, "2 bytes each", "ZeRO-1: 12 bytes each", "4 bytes each", "own gradients"),
        (2, 1, "2 bytes each", "ZeRO-2: 12 bytes each", "4 bytes each", "bucket, second sum"),
    ],
)
def test_where_the_bytes_come_from_is_told(stage, dp, weights, optimizer, gradients, update):
    how = ZeroSizes(P, 2, dp, stage, LARGEST).how
    assert how == {"weights": weights, "optimizer": optimizer, "gradients": gradients, "update": update}
