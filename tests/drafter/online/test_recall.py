"""drafter/online/recall.py: rows of the buffer give the same teacher outputs as the model that made them."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.loss import distill_loss
from respec_trainer.drafter.online.learner import LearnerRank
from respec_trainer.drafter.online.recall import recall
from respec_trainer.drafter.online.rows import rows_of_step
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.drafter.temperature import AtTemperature
from tests.support.drafters import DRAFT_IDS, stored_row, stored_snapshot, target_config, tiny_drafter
from tests.support.learners import LAYERS, random_samples, score
from tests.support.models import save_tiny_model, tiny_model

LENGTHS = [(3, 9), (5, 4), (2, 12), (4, 1)]


def stored(temperature: float = 1.0) -> list:
    model, rows = tiny_model(target_config()), []
    for step in range(2):  # two snapshots
        samples = random_samples(LENGTHS, step)
        rewards = torch.arange(4.0).view(2, 2)
        config = DrafterConfig(weighting="reward")
        rows += rows_of_step(samples, score(model, samples, temperature), rewards, config, LearnerRank(), 1).rows
    return [rows[i] for i in (5, 0, 1, 6, 7, 2)]


def test_a_recalled_batch_teaches_what_the_model_teaches(tmp_path):
    rows = stored()
    batch, recalled = recall(rows, 1.0, torch.device("cpu"), DRAFT_IDS)
    teacher = HFTeacher(save_tiny_model(tmp_path / "actor", target_config()), DRAFT_IDS, LAYERS)
    expected = teacher(batch)
    inside = torch.arange(batch.tokens.shape[1]) < torch.tensor([len(row.tokens) for row in rows])[:, None]
    # fp32 rounding: rows were scored one by one, and together.
    close = {"rtol": 1e-5, "atol": 2e-5}
    for name in ("features", "embeddings"):
        torch.testing.assert_close(getattr(recalled, name)[inside], getattr(expected, name)[inside], **close)
    for name in ("draft_logits", "logsumexp"):
        torch.testing.assert_close(getattr(recalled, name), getattr(expected, name), **close)
    assert batch.weights.tolist() == pytest.approx([row.weight for row in rows])
    losses = [distill_loss(tiny_drafter(), batch, target, 3)[1].means() for target in (recalled, expected)]
    for name in losses[0]:
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4), name


def test_both_distributions_are_taken_at_the_sampling_temperature():
    temperature = 0.5
    batch, teacher = recall(stored(temperature), temperature, torch.device("cpu"))
    drafter = tiny_drafter()
    _, sums = distill_loss(AtTemperature(drafter, temperature), batch, teacher, 1)
    # By hand, in float64 and row by row: p and q at the temperature, alpha = sum of min(p, q), top1 = p(argmax q).
    model, alpha, top1 = tiny_model(target_config()), 0.0, 0.0
    (hidden,) = drafter.unroll(teacher.embeddings, teacher.features, 1)
    for row in range(len(batch)):
        where = batch.response_mask[row].nonzero()[:, 0]
        logits = model(batch.tokens[row : row + 1, : where[-1] + 1]).logits[0].double()
        for token in where[1:].tolist():  # the first is drawn with the prompt
            p = (logits[token - 1] / temperature).softmax(-1)[DRAFT_IDS]
            q = (drafter.logits(hidden[row, token - 2]).double() / temperature).softmax(-1)
            alpha, top1 = alpha + torch.minimum(p, q).sum().item(), top1 + p[q.argmax()].item()
    assert sums.alpha.item() == pytest.approx(alpha, rel=1e-4)
    assert sums.top1.item() == pytest.approx(top1, rel=1e-4)


def test_every_row_is_read_with_the_weights_of_its_own_step():
    """Hidden states fit the output rows and embeddings of the actor that made them, in any order of rows."""
    snapshots = [stored_snapshot(seed=seed) for seed in (0, 1)]
    rows = [stored_row(snapshots[which], response=4 + n, seed=n) for n, which in enumerate((0, 1, 1, 0))]
    batch, teacher = recall(rows, 0.5, torch.device("cpu"))
    logits = torch.cat([row.hidden.double() @ row.snapshot.output_rows.double().t() / 0.5 for row in rows])
    torch.testing.assert_close(teacher.draft_logits.double(), logits, rtol=1e-4, atol=1e-4)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        assert torch.equal(teacher.embeddings[index, :length], row.snapshot.embeddings[row.tokens])
        assert batch.response_mask[index].tolist() == [False] * 3 + [True] * (4 + index) + [False] * (3 - index)
