"""drafter/distill.py: training makes drafts better, and the same seed gives the same result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from respec_trainer.drafter.distill import DistillSettings, distill, evaluate
from respec_trainer.drafter.loss import distill_loss
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.errors import TrainingError
from tests.support.drafters import DRAFT_IDS, random_rollouts, target_config, tiny_drafter
from tests.support.models import save_tiny_model

SETTINGS = DistillSettings(updates=40, batch_size=8, steps=3, lr=3e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return HFTeacher(save_tiny_model(tmp_path_factory.mktemp("actor"), target_config()), DRAFT_IDS, (0, 1, 2))


@pytest.fixture(scope="module")
def rollouts():
    return random_rollouts([(3, 6 + i % 5) for i in range(32)])


def test_training_lowers_the_loss_and_raises_acceptance_at_every_depth(teacher, rollouts):
    drafter, seen = tiny_drafter(), []
    before = evaluate(drafter, teacher, rollouts, SETTINGS)
    history = distill(drafter, teacher, rollouts, SETTINGS, progress=seen.append)
    after = evaluate(drafter, teacher, rollouts, SETTINGS)
    assert seen == history and [record["update"] for record in history] == list(range(1, 41))
    for k in range(3):
        assert after.loss[k] < 0.7 * before.loss[k]
        assert after.alpha[k] > before.alpha[k] + 0.05
        assert after.top1[k] > before.top1[k]
    assert after.accept_length[2] > before.accept_length[2] >= 1.0
    assert evaluate(drafter, teacher, rollouts, SETTINGS) == after  # evaluation changes nothing


@pytest.mark.parametrize("loss", ["acceptance", "log_acceptance", "mixed"])
def test_every_loss_raises_acceptance_from_a_random_start(teacher, rollouts, loss):
    drafter, settings = tiny_drafter(), dataclasses.replace(SETTINGS, loss=loss)
    before = evaluate(drafter, teacher, rollouts, settings)
    distill(drafter, teacher, rollouts, settings)
    after = evaluate(drafter, teacher, rollouts, settings)
    for k in range(3):
        assert after.loss[k] < before.loss[k] and after.alpha[k] > before.alpha[k] + 0.05


def test_learning_rate_rises_and_falls(teacher, rollouts):
    settings = dataclasses.replace(SETTINGS, updates=10, warmup=0.3)
    rates = [record["lr"] / settings.lr for record in distill(tiny_drafter(), teacher, rollouts, settings)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False)) and rates[-1] > 0


def test_the_same_seed_gives_the_same_drafter(teacher, rollouts):
    settings = dataclasses.replace(SETTINGS, updates=5)
    first, second, third = tiny_drafter(), tiny_drafter(), tiny_drafter()
    assert distill(first, teacher, rollouts, settings) == distill(second, teacher, rollouts, settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    distill(third, teacher, rollouts, dataclasses.replace(settings, seed=1))
    assert not torch.equal(first.fc.weight, third.fc.weight)


def test_a_loss_that_is_not_finite_does_not_reach_the_weights(teacher, rollouts):
    drafter = tiny_drafter()
    before = [p.clone() for p in drafter.parameters()]

    def broken(batch):
        output = teacher(batch)
        return dataclasses.replace(output, draft_logits=output.draft_logits * torch.nan)

    with pytest.raises(TrainingError, match="update 1: loss nan"):
        distill(drafter, broken, rollouts, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, drafter.parameters(), strict=True))


def test_muon_trains_the_inner_matrices_and_nothing_else(teacher, rollouts):
    start = {name: weight.clone() for name, weight in tiny_drafter().named_parameters()}
    plain, mixed = tiny_drafter(), tiny_drafter()
    distill(plain, teacher, rollouts, dataclasses.replace(SETTINGS, updates=1))
    distill(mixed, teacher, rollouts, dataclasses.replace(SETTINGS, updates=1, matrix_lr=2e-2))
    for (name, adamw), muon in zip(plain.named_parameters(), mixed.parameters(), strict=True):
        inner = muon.ndim == 2 and name != "lm_head.weight"
        assert not torch.equal(muon, start[name]), name
        assert torch.equal(adamw, muon) != inner, name


def test_training_in_bf16_keeps_weights_and_stays_close(teacher, rollouts):
    settings = dataclasses.replace(SETTINGS, updates=5)
    exact = distill(tiny_drafter(), teacher, rollouts, settings)
    drafter = tiny_drafter()
    rounded = distill(drafter, teacher, rollouts, dataclasses.replace(settings, bf16=True))
    assert all(weight.dtype == torch.float32 for weight in drafter.parameters())
    for one, other in zip(exact, rounded, strict=True):
        # bf16 keeps 8 bits; the loss averages a hundred tokens and five depths.
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)


def test_it_trains_and_measures_at_the_temperature(teacher, rollouts):
    """A drafter at T drafts as one whose output layer is divided by T, for which T is 1."""
    warm, divided = tiny_drafter(), tiny_drafter()
    with torch.no_grad():
        divided.lm_head.weight /= 0.6
    at = dataclasses.replace(SETTINGS, temperature=0.6)
    one, other = evaluate(warm, teacher, rollouts, at), evaluate(divided, teacher, rollouts, SETTINGS)
    assert one.alpha == pytest.approx(other.alpha, rel=1e-4) and one.loss == pytest.approx(other.loss, rel=1e-4)
    assert one.alpha != pytest.approx(evaluate(warm, teacher, rollouts, SETTINGS).alpha, rel=1e-2)
    losses = [distill(d, teacher, rollouts, s)[0]["loss"] for d, s in ((warm, at), (divided, SETTINGS))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_updates_are_those_of_a_plain_loop(teacher, rollouts):
    """AdamW with clipped gradients on fair batches, written out; every setting differs from its default."""
    settings = DistillSettings(
        updates=4,
        batch_size=5,
        by_length=False,
        steps=2,
        loss="mixed",
        decay=0.3,
        lr=2e-2,
        warmup=0.5,
        clip=0.05,
        seed=3,
    )
    settings = dataclasses.replace(settings, weight_decay=0.4, betas=(0.7, 0.9))
    drafter, other = tiny_drafter(), tiny_drafter()
    history = distill(drafter, teacher, rollouts, settings)
    optimizer = torch.optim.AdamW(other.parameters(), betas=(0.7, 0.9), weight_decay=0.4)
    batches = rollouts.batches(5, torch.Generator().manual_seed(3), by_length=False)
    for factor, record, batch in zip((0.5, 1.0, 1.0, 0.5), history, batches, strict=False):
        optimizer.param_groups[0]["lr"] = 2e-2 * factor  # half of the updates rise, then a cosine
        loss, _ = distill_loss(other, batch, teacher(batch), 2, 0.3, kind="mixed")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in other.parameters()]).norm()
        for weight in other.parameters():
            weight.grad *= min(1.0, 0.05 / norm.item())
        optimizer.step()
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=1e-3)
        assert record["lr"] == pytest.approx(2e-2 * factor)
    for got, wanted in zip(drafter.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-4)  # AdamW enlarges rounding of small gradients


def test_it_evaluates_all_rows_however_they_are_batched(teacher, rollouts):
    one, parts = (
        evaluate(tiny_drafter(), teacher, rollouts, dataclasses.replace(SETTINGS, batch_size=size)) for size in (32, 5)
    )
    for name, values in vars(one).items():
        assert getattr(parts, name) == pytest.approx(values, rel=1e-4), name


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(teacher, rollouts):
    """Its loss may be finite."""
    drafter = tiny_drafter()
    drafter.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = [p.clone() for p in drafter.parameters()]
    with pytest.raises(TrainingError, match="gradient norm (nan|inf)"):
        distill(drafter, teacher, rollouts, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, drafter.parameters(), strict=True))
