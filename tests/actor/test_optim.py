from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.actor.optim import learning_rate_factor, setup_optimizer
from respec_trainer.config import OptimConfig

SCHEDULES = st.sampled_from(("constant", "linear", "cosine"))
CASES = st.builds(OptimConfig, warmup_steps=st.integers(0, 20), schedule=SCHEDULES, min_lr_ratio=st.floats(0, 1))


def test_warm_up_rises_from_above_zero_to_one():
    config = OptimConfig(warmup_steps=4)
    assert [learning_rate_factor(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_the_ratio_in_the_last_update():
    config = OptimConfig(warmup_steps=1, schedule="linear", min_lr_ratio=0.2)
    factors = [learning_rate_factor(config, step, 6) for step in range(6)]
    assert factors == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_halfway_in_the_middle():
    config = OptimConfig(schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate_factor(config, 5, 11) == pytest.approx(0.55)
    assert learning_rate_factor(config, 10, 11) == pytest.approx(0.1)


@given(CASES, st.integers(1, 40))
def test_never_above_one_never_below_the_ratio_and_falling_after_warm_up(config, total):
    factors = [learning_rate_factor(config, step, total) for step in range(total + 5)]
    warm, rest = factors[: config.warmup_steps], factors[config.warmup_steps :]
    assert all(0 < factor <= 1 for factor in warm)
    assert warm == sorted(warm)
    assert all(config.min_lr_ratio - 1e-12 <= factor <= 1 for factor in rest)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rest, rest[1:], strict=False))
    if config.schedule != "constant" and total > config.warmup_steps + 1:
        assert factors[total - 1] == pytest.approx(config.min_lr_ratio, abs=1e-12)
        assert factors[-1] == factors[total - 1]


def test_only_matrices_decay():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3,), (4, 4), ())]
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    optimizer = setup_optimizer(
        [*parameters, frozen], OptimConfig(weight_decay=0.1, lr=1e-3, betas=[0.8, 0.9], eps=1e-5)
    )
    decayed, kept = optimizer.param_groups
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert [p.dim() for p in kept["params"]] == [1, 0]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, kept):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-3, (0.8, 0.9), 1e-5, True)
