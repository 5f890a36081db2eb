"""An objective of one new file and a line in the registry trains a real actor; docs/extending.md describes how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from respec_trainer.objective.registry import OBJECTIVES
from tests.support.actors import build_actor, make_batch, my_rows, variant
from tests.support.leave_one_out import LEAVE_ONE_OUT
from tests.support.models import save_tiny_model, tiny_config, tiny_model
from tests.support.processes.ranks import run_ranks
from tests.support.reference_actor import reference_scores

NAN = float("nan")
REWARDS = [[1.0, 0.0, 0.0, NAN], [0.5, 2.0, -1.0, 0.5]]
ADVANTAGES = [1.0, -0.5, -0.5, 0.0, 0.0, 2.0, -2.0, 0.0]  # 2 - (0.5 - 1 + 0.5) / 3 = 2, and so on
SKIPPED = 3  # the row without a score: none of its tokens is trained on


def train(folder: Path, changes: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """The advantages, and the metrics of one update with them."""
    from respec_trainer.actor.parallel import shutdown_parallel

    if "leave_one_out" not in OBJECTIVES:  # the process may have served another test
        OBJECTIVES.add("leave_one_out", LEAVE_ONE_OUT)
    actor = build_actor(folder, changes)
    batch, _ = make_batch(actor.hf_config.vocab_size)
    batch.response_mask[SKIPPED] = False
    advantages = actor.objective.advantages(torch.tensor(REWARDS))
    rows = my_rows(actor, batch)
    old = actor.infer(batch.rows(rows)).logprobs
    stats = actor.update(batch.rows(rows), old, advantages.flatten()[rows])
    actor.engine.destroy()
    shutdown_parallel()
    return advantages, stats


def test_an_objective_in_one_new_file_trains_the_actor(tmp_path):
    folder = save_tiny_model(tmp_path, tiny_config("qwen3"))
    model = tiny_model(tiny_config("qwen3"))
    batch, _ = make_batch(model.config.vocab_size)
    batch.response_mask[SKIPPED] = False
    logprobs = reference_scores(model, batch.tokens)[0]
    loss = -(torch.tensor(ADVANTAGES)[:, None] * logprobs)[batch.response_mask].mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    surprisal = -logprobs[batch.response_mask]
    changes = variant(1, 1, 3, **{"objective.kind": "leave_one_out"})
    for advantages, stats in run_ranks(2, train, folder, changes):
        assert advantages.flatten().tolist() == pytest.approx(ADVANTAGES)
        assert stats["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert stats["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert stats["policy/surprisal"] == pytest.approx(surprisal.mean().item(), rel=1e-5)
        assert stats["policy/surprisal_max"] == pytest.approx(surprisal.max().item(), rel=1e-5)
        assert not any(name.startswith("mismatch/") for name in stats), "only what the objective measures"
