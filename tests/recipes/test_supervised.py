"""recipes/supervised.py: the loss and the learning rate follow their formulas, and learning works."""

from __future__ import annotations

import itertools

import pytest
import torch

from respec_trainer.recipes import supervised
from respec_trainer.recipes.lessons import IGNORED
from respec_trainer.recipes.small_actor import TeachingRecipe
from respec_trainer.recipes.supervised import rate, setup_optimizers, summed_loss, train_supervised
from tests.support.models import tiny_config, tiny_model


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(supervised, "bf16_is_quick", lambda: False)
    return tiny_model(tiny_config("qwen3"))


def batch(seed=0):
    ids = torch.randint(3, 131, (4, 12), generator=torch.Generator().manual_seed(seed))
    targets = ids.clone()
    targets[:, :5] = IGNORED
    return ids, targets


def test_the_loss_is_cross_entropy_of_the_targets_alone(model):
    ids, targets = batch()
    loss, tokens = summed_loss(model, ids, targets)
    log_probs = model(input_ids=ids).logits.log_softmax(-1)
    expected = -sum(log_probs[b, t - 1, ids[b, t]] for b in range(4) for t in range(5, 12))
    assert tokens == 28
    torch.testing.assert_close(loss, expected)


def test_bf16_is_close_to_fp32(model, monkeypatch):
    exact, _ = summed_loss(model, *batch())
    monkeypatch.setattr(supervised, "bf16_is_quick", lambda: True)
    rounded, _ = summed_loss(model, *batch())
    # bf16 keeps 8 bits: an error of some 1e-2 a token, of random sign.
    assert abs(rounded.item() - exact.item()) < 2e-2 * exact.item() and rounded.dtype == torch.float32


def test_every_weight_has_one_optimizer(model):
    muon, adamw = setup_optimizers(model, 1e-3, 1e-2)
    groups = [{id(w) for group in optimizer.param_groups for w in group["params"]} for optimizer in (muon, adamw)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == {id(w) for w in model.parameters()}
    names = {name for name, weight in model.named_parameters() if id(weight) in groups[0]}
    assert "model.layers.0.self_attn.q_proj.weight" in names and len(names) == 2 * 7
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in names)


def test_learning_lowers_the_loss(model):
    teaching = TeachingRecipe(steps=30, lr=3e-3, matrix_lr=1e-2, warmup_steps=3)
    before = summed_loss(model, *batch())[0].item() / 28
    lines = []
    after = train_supervised(model, itertools.repeat(batch()), teaching, lines.append)
    final = summed_loss(model, *batch())[0].item() / 28
    assert final < 0.2 * before and final < after < before  # `after` is the mean over the steps
    assert len(lines) == 1 and lines[0].startswith("step 30/30")


def test_rates_rise_stay_and_fall():
    teaching = TeachingRecipe(steps=100, warmup_steps=10, decay=0.5)
    rates = [rate(step, teaching) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5) and rates[100] == 0.0


def test_rates_without_warm_up_or_decay():
    teaching = TeachingRecipe(steps=5, warmup_steps=0, decay=0.0)
    assert [rate(step, teaching) for step in range(5)] == [1.0] * 5
