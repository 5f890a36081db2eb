"""drafter/loss.py: loss and acceptance against loops over tokens, row weights, chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.loss import DepthSums, distill_loss, drafted_positions, predicted_accept_length
from respec_trainer.drafter.teacher import HFTeacher
from tests.support.drafters import DRAFT_IDS, random_rollouts, target_config, tiny_drafter
from tests.support.models import save_tiny_model, tiny_model

STEPS, DECAY = 3, 0.8
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return HFTeacher(save_tiny_model(tmp_path_factory.mktemp("actor"), target_config()), DRAFT_IDS, LAYERS)


@pytest.fixture
def batch():
    rollouts = random_rollouts([(4, 5), (3, 8), (5, 2)])
    return dataclasses.replace(rollouts, weights=torch.tensor([1.0, 0.5, 2.0]))


def one_row(batch, row):
    return batch.rows(torch.tensor([row]))


def brute_force(batch: DrafterBatch, drafter):
    """Per depth, for each drafted token: (row weight, KL, alpha, top1, mass), from the whole softmax of the model."""
    model = tiny_model(target_config())
    tokens, mask = batch.tokens, batch.response_mask
    whole = model(input_ids=tokens, output_hidden_states=True)
    features = torch.cat([whole.hidden_states[layer + 1] for layer in LAYERS], -1)
    table = []
    for k, hidden in enumerate(drafter.unroll(whole.hidden_states[0], features, STEPS)):
        entries = []
        for b in range(tokens.shape[0]):
            for t in range(tokens.shape[1] - 2 - k):
                if not (mask[b, t + 1] and mask[b, t + 2 + k]):
                    continue
                p = whole.logits[b, t + 1 + k].softmax(-1)[DRAFT_IDS]  # predicts x_{t+2+k}
                q = drafter.logits(hidden[b, t]).softmax(-1)
                share = p / p.sum()
                kl = (p * (share / q).log()).sum()
                alpha = sum(min(p[v], q[v]) for v in range(len(DRAFT_IDS)))
                entries.append(torch.stack([batch.weights[b], kl, alpha, p[q.argmax()], p.sum()]))
        table.append(torch.stack(entries))
    return table


@torch.no_grad()
def test_loss_and_acceptance_by_brute_force(teacher, batch):
    drafter = tiny_drafter()
    loss, sums = distill_loss(drafter, batch, teacher(batch), STEPS, DECAY)
    table, means = brute_force(batch, drafter), sums.means()
    assert sums.tokens.tolist() == [len(entries) for entries in table] == [12, 9, 7]
    expected = 0.0
    for k, entries in enumerate(table):
        weights, kl, alpha, top1, _ = entries.unbind(1)
        kl = (weights * kl).sum() / weights.sum()
        expected += DECAY**k * kl.item()
        # float32 through the model and the drafter, with sums in another order.
        assert means["loss"][k] == pytest.approx(kl.item(), rel=1e-4)
        assert means["alpha"][k] == pytest.approx(alpha.mean().item(), rel=1e-4)
        assert means["top1"][k] == pytest.approx(top1.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def gradient(drafter, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(drafter.parameters()))])


def test_a_row_of_weight_zero_leaves_no_trace(teacher, batch):
    drafter = tiny_drafter()
    lone = one_row(batch, 1)
    others_off = dataclasses.replace(batch, weights=torch.tensor([0.0, 1.0, 0.0]))
    expected, _ = distill_loss(drafter, lone, teacher(lone), STEPS)
    got, sums = distill_loss(drafter, others_off, teacher(others_off), STEPS)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)  # sums in another order
    torch.testing.assert_close(gradient(drafter, got), gradient(drafter, expected), rtol=1e-4, atol=1e-6)
    assert sums.tokens.tolist() == [12, 9, 7]  # acceptance is of all rows

    # Exactly none: loss and gradient are bitwise the same for any content of the rows of weight zero.
    target = teacher(batch)
    logits, sums = target.draft_logits.clone(), target.logsumexp.clone()
    logits[:5] -= 3.0 * torch.arange(64)
    logits[13:], sums[13:] = 0.0, 50.0
    changed = dataclasses.replace(target, draft_logits=logits, logsumexp=sums)
    first, _ = distill_loss(drafter, others_off, target, STEPS)
    second, _ = distill_loss(drafter, others_off, changed, STEPS)
    assert torch.equal(first, second)
    assert torch.equal(gradient(drafter, first), gradient(drafter, second))


def test_equal_weights_of_any_size_change_nothing(teacher, batch):
    drafter, target = tiny_drafter(), teacher(batch)
    losses = [
        distill_loss(drafter, dataclasses.replace(batch, weights=torch.full((3,), w)), target, STEPS)[0].item()
        for w in (1.0, 7.0)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # rounding of the weighted sums


def test_no_weight_at_all_is_a_loss_of_zero(teacher, batch):
    drafter = tiny_drafter()
    nothing = dataclasses.replace(batch, weights=torch.zeros(3))
    loss, _ = distill_loss(drafter, nothing, teacher(nothing), STEPS)
    assert loss.item() == 0.0
    assert not gradient(drafter, loss).any()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_loss_nor_gradient(teacher, batch, chunk):
    drafter, target = tiny_drafter(), teacher(batch)
    whole, sums = distill_loss(drafter, batch, target, STEPS)
    parts, sums_of_parts = distill_loss(drafter, batch, target, STEPS, chunk=chunk)
    # float32 sums in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(drafter, parts), gradient(drafter, whole), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums_of_parts.alpha, sums.alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["acceptance", "log_acceptance", "mixed"])
@torch.no_grad()
def test_other_losses_change_the_loss_alone(teacher, batch, kind):
    drafter, target = tiny_drafter(), teacher(batch)
    loss, sums = distill_loss(drafter, batch, target, STEPS, DECAY, kind=kind, chunk=4)
    _, kl = distill_loss(drafter, batch, target, STEPS, DECAY)
    expected = 0.0
    for k, entries in enumerate(brute_force(batch, drafter)):
        weights, divergence, alpha, _, mass = entries.unbind(1)
        logs = -mass * (alpha / mass).log()
        losses = {"acceptance": 1 - alpha, "log_acceptance": logs, "mixed": divergence + 1 - alpha}[kind]
        expected += DECAY**k * (weights * losses).sum().item() / weights.sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # float32 through model and drafter, sums in another order
    for name in ("weight", "alpha", "top1", "tokens", "passes", "gained"):
        torch.testing.assert_close(getattr(sums, name), getattr(kl, name), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_walks_count_a_choice_that_is_the_response_s_token(teacher):
    """Responses made from some of the drafter's own choices: the counted passes equal a loop over single drafts."""
    drafter, batch = tiny_drafter(), random_rollouts([(4, 12), (3, 9)])
    target, passes = teacher(batch), []
    choices = [DRAFT_IDS[drafter.logits(h).argmax(-1)] for h in drafter.unroll(target.embeddings, target.features, 1)]
    tokens = batch.tokens.clone()
    # The first new token changes the drafts after it, so only the first of the two is certain to be a hit.
    tokens[:, 9:11] = choices[0][:, 7:9]
    batch = dataclasses.replace(batch, tokens=tokens)
    target = teacher(batch)
    sums = distill_loss(drafter, batch, target, STEPS)[1]
    hidden = list(drafter.unroll(target.embeddings, target.features, STEPS))
    for row in range(2):
        end, known, count = (
            int(batch.response_mask[row].nonzero()[-1]),
            int(batch.response_mask[row].long().argmax()),
            0,
        )
        while known < end:
            start, count = known - 1, count + 1
            for k in range(STEPS):
                choice = DRAFT_IDS[drafter.logits(hidden[k][row, start]).argmax()]
                if known >= end or choice != tokens[row, known + 1]:
                    break
                known += 1
            known += 1
        passes.append(count)
    assert sums.passes[-1].item() == sum(passes) < sums.gained[-1].item() == 11 + 8
    assert sums.means()["accept_length"][-1] == pytest.approx(19 / sum(passes))


@torch.no_grad()
def test_without_the_draft_vocabulary_no_walk_is_taken(teacher, batch):
    target = dataclasses.replace(teacher(batch), draft_ids=None)
    sums = distill_loss(tiny_drafter(), batch, target, STEPS)[1]
    assert not sums.passes.any() and not sums.gained.any() and sums.tokens.all()
    assert sums.means()["accept_length"] == [1.0] * STEPS


@torch.no_grad()
def test_sums_of_batches_add_up(teacher, batch):
    drafter = tiny_drafter()
    whole = distill_loss(drafter, batch, teacher(batch), STEPS)[1].means()
    rows = [one_row(batch, row) for row in range(3)]
    sums = [distill_loss(drafter, row, teacher(row), STEPS)[1] for row in rows]
    for name, values in (sums[0] + sums[1] + sums[2]).means().items():
        assert values == pytest.approx(whole[name], rel=1e-4)  # other sums, other rounding


@torch.no_grad()
def test_a_drafter_that_knows_the_target_is_always_accepted(teacher, batch):
    """If the teacher's whole mass is inside the draft vocabulary, q = p~ has alpha 1 and a divergence of 0."""
    drafter, target = tiny_drafter(), teacher(batch)
    hidden = next(drafter.unroll(target.embeddings, target.features, 1))
    drafted = drafted_positions(batch.response_mask, 0)
    logits = torch.zeros_like(target.draft_logits)
    rows = (batch.response_mask.flatten().cumsum(0) - 1).view_as(batch.response_mask)
    logits[rows[:, 2:][drafted[:, :-2]]] = drafter.logits(hidden[drafted])
    same = dataclasses.replace(target, draft_logits=logits, logsumexp=logits.logsumexp(-1))
    loss, sums = distill_loss(drafter, batch, same, 1)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert sums.means()["alpha"][0] == pytest.approx(1.0, abs=1e-5)


def test_drafted_positions_are_those_of_serving():
    mask = torch.tensor([[False, False, True, True, True, True, False]])  # x_2 .. x_5 are the response
    assert drafted_positions(mask, 0).nonzero()[:, 1].tolist() == [1, 2, 3]  # drafts x_3, x_4, x_5
    assert drafted_positions(mask, 2).nonzero()[:, 1].tolist() == [1]  # drafts x_5
    assert not drafted_positions(mask, 3).any()


def test_responses_of_one_token_draft_nothing(teacher):
    batch = random_rollouts([(4, 1), (2, 1)])
    loss, sums = distill_loss(tiny_drafter(), batch, teacher(batch), STEPS)
    assert loss.item() == 0.0 and sums.means()["alpha"] == [0.0] * STEPS


def test_predicted_accept_length_by_hand():
    assert predicted_accept_length([0.5, 0.8, 0.25], 3) == pytest.approx(1 + 0.5 + 0.4 + 0.1)
    assert predicted_accept_length([0.5, 0.8], 1) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="2 depths"):
        predicted_accept_length([0.5, 0.8], 3)


def test_means_where_nothing_was_drafted():
    sums = DepthSums(*(torch.zeros(2) for _ in dataclasses.fields(DepthSums)))
    zeros, ones = [0.0, 0.0], [1.0, 1.0]
    assert sums.means() == {"loss": zeros, "alpha": zeros, "top1": zeros, "accept_length": ones}
