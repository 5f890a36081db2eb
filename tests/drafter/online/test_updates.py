"""drafter/online/updates.py: the gradient of an update however its rows are divided, clipping, rates, and its state."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.loss import distill_loss, drafted_weights
from respec_trainer.drafter.muon import Muon
from respec_trainer.drafter.online.recall import recall
from respec_trainer.drafter.online.updates import PARTS, DrafterUpdates, batches
from tests.support.drafters import stored_row, stored_snapshot, tiny_drafter

CPU = torch.device("cpu")
# The third response is drafted at the first depth alone, the fifth not at all.
RESPONSES, WEIGHTS = (9, 4, 2, 6, 1, 12, 3, 7), (1.0, 4.0, 0.5, 0.1, 2.0, 1.5, 0.1, 3.0)
UNROLL, DECAY = 3, 0.5
KEYS = {"weighting": "reward", "unroll": UNROLL, "decay": DECAY, "clip": 1e9, "matrix_lr": None, "warmup_updates": 0}


def eight_rows() -> list:
    snapshot = stored_snapshot()
    made = [stored_row(snapshot, response=length, seed=i) for i, length in enumerate(RESPONSES)]
    return [dataclasses.replace(row, weight=weight) for row, weight in zip(made, WEIGHTS, strict=True)]


ROWS = eight_rows()


def totals(rows=ROWS) -> list[float]:
    """The weights of the drafted tokens by depth, with a loop: x_{t+2+k} after the first token of the response."""
    found = [0.0] * UNROLL
    for row in rows:
        for k in range(UNROLL):
            found[k] += sum(row.weight for t in range(row.response) if t >= 1 + k)
    return found


def micros(size: int, rows=ROWS, temperature: float = 1.0) -> list:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [partial(recall, part, temperature, CPU) for part in parts]


def make(temperature: float = 1.0, **changes) -> DrafterUpdates:
    return DrafterUpdates(tiny_drafter(), DrafterConfig(**(KEYS | changes)), temperature)


def gradient_of(updates: DrafterUpdates) -> torch.Tensor:
    return updates.flat[: updates.size].clone()


def expected(rows=ROWS, drafter=None, kind="kl") -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of all rows in one batch, and its gradient by autograd."""
    drafter = drafter or tiny_drafter()
    loss, _ = distill_loss(drafter, *recall(rows, 1.0, CPU), UNROLL, DECAY, kind=kind)
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(drafter.parameters()))])


def close(got, wanted) -> None:
    """float32 sums in another order."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def yes() -> bool:
    return True


@pytest.mark.parametrize("kind", ["kl", "mixed"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole(size, kind):
    updates, (loss, gradient) = make(loss=kind), expected(kind=kind)
    outcome = updates.step(micros(size), totals(), yes)
    assert outcome.applied and outcome.finite and outcome.whole
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    close(gradient_of(updates), gradient)


def test_the_sums_are_those_of_all_rows():
    updates, (_, sums) = make(), distill_loss(tiny_drafter(), *recall(ROWS, 1.0, CPU), UNROLL, DECAY)
    updates.step(micros(3), totals(), yes)
    for name in PARTS:
        torch.testing.assert_close(getattr(updates.sums(), name), getattr(sums, name), rtol=1e-5, atol=1e-6)
    assert updates.sums().weight.tolist() == pytest.approx(totals())


def test_weights_of_drafted_tokens_are_those_of_a_loop():
    found = drafted_weights(torch.tensor(RESPONSES), torch.tensor(WEIGHTS), UNROLL)
    assert found.tolist() == pytest.approx(totals()) and found.dtype == torch.float64
    assert drafted_weights(torch.tensor([]), torch.tensor([]), 2).tolist() == [0.0, 0.0]


def test_an_update_cut_short_is_made_from_what_it_has():
    """Losses by depth are divided by the weights of the rows that were to come, and then by the share that came."""
    turns, updates = iter([True, True, False]), make()
    outcome = updates.step(micros(2), totals(), lambda: next(turns))
    assert outcome.applied and not outcome.whole
    done, drafter, loss = ROWS[:4], tiny_drafter(), 0.0
    for k in range(UNROLL):
        sums = distill_loss(drafter, *recall(done, 1.0, CPU), k + 1, 1.0)[0]
        before = distill_loss(drafter, *recall(done, 1.0, CPU), k, 1.0)[0] if k else 0.0
        loss = loss + DECAY**k * (sums - before) * totals(done)[k] / totals()[k]
    share = totals(done)[0] / totals()[0]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss / share, list(drafter.parameters()))])
    close(gradient_of(updates), gradient)
    assert outcome.loss == pytest.approx((loss / share).item(), rel=1e-5)


@pytest.mark.parametrize("turns", [[True] * 4, [True, False]])
def test_the_norm_is_clipped_of_what_is_applied(turns):
    """Also after an update that was cut short: clipping comes after the division by its share."""
    unclipped, low, high = make(), make(clip=0.01), make(clip=1e3)
    for updates in (unclipped, low, high):
        updates.step(micros(2), totals(), partial(next, iter(turns)))
    whole = gradient_of(unclipped)
    assert 0.02 < whole.norm() < 100
    assert gradient_of(low).norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradient_of(low) / 0.01, whole / whole.norm(), rtol=1e-3, atol=1e-6)
    assert torch.equal(gradient_of(high), whole)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_an_update_is_at_the_sampling_temperature(temperature):
    """A drafter at T drafts as one whose output layer is divided by T; the chain rule gives that layer's gradient."""
    updates, other = make(temperature), tiny_drafter()
    logits = [row.hidden @ row.snapshot.output_rows.t() / temperature for row in ROWS]
    # As if tokens outside the draft vocabulary had a third of the mass.
    sums = [scores.logsumexp(-1) + torch.tensor(1.5).log() for scores in logits]
    rows = [dataclasses.replace(row, logsumexp=whole) for row, whole in zip(ROWS, sums, strict=True)]
    with torch.no_grad():
        other.lm_head.weight /= temperature
    batch, teacher = recall(rows, temperature, CPU)
    loss, _ = distill_loss(other, batch, teacher, UNROLL, DECAY)
    loss.backward()
    other.lm_head.weight.grad /= temperature
    assert updates.step(micros(4, rows, temperature), totals(), yes).loss == pytest.approx(loss.item(), rel=1e-5)
    close(gradient_of(updates), torch.cat([weight.grad.flatten() for weight in other.parameters()]))


def test_rates_rise_from_one_part_to_the_whole():
    """The rates of the first updates with a warm-up of 4 are 1/4, 2/4, 3/4, 1 and 1 of those set."""
    updates = make(warmup_updates=4, lr=0.02, matrix_lr=0.3)
    seen = [[group["lr"] for o in updates.optimizers for group in o.param_groups]]
    for _ in range(4):
        updates.step(micros(8), totals(), yes)
        seen.append([group["lr"] for o in updates.optimizers for group in o.param_groups])
    assert isinstance(updates.optimizers[1], Muon)
    assert [rates[0] for rates in seen] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])
    assert [rates[1] for rates in seen] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3])
    assert make(warmup_updates=0, lr=0.02).optimizers[0].param_groups[0]["lr"] == 0.02


def test_the_first_update_is_adamw_s():
    """The first step of AdamW, bias-corrected, is -lr * sign(g), after the decay of the weights."""
    updates = make(lr=1e-3, weight_decay=0.1)
    before = torch.cat([weight.detach().flatten().clone() for weight in updates.parameters])
    updates.step(micros(8), totals(), yes)
    after, gradient = torch.cat([w.detach().flatten() for w in updates.parameters]), gradient_of(updates)
    clear = gradient.abs() > 1e-4  # far above AdamW's eps of 1e-8
    wanted = before * (1 - 1e-3 * 0.1) - 1e-3 * gradient.sign()
    torch.testing.assert_close(after[clear], wanted[clear], rtol=1e-5, atol=2e-7)
    assert clear.sum() > 1000


def test_each_update_has_the_gradient_of_its_own_rows():
    updates = make(lr=1e-12)
    for rows in (ROWS[:4], ROWS[4:]):
        updates.step(micros(2, rows), totals(rows), yes)
        close(gradient_of(updates), expected(rows)[1])


def test_without_rows_or_drafted_tokens_nothing_is_applied():
    updates = make()
    before = [weight.clone() for weight in updates.parameters]
    for some, weights in (([lambda: None] * 2, [0.0] * UNROLL), (micros(1, ROWS[4:5]), totals(ROWS[4:5]))):
        outcome = updates.step(some, weights, yes)
        assert (outcome.applied, outcome.finite, outcome.loss, outcome.whole) == (False, True, 0.0, True)
    outcome = updates.step(micros(4), totals(), lambda: False)
    assert (outcome.applied, outcome.finite, outcome.whole) == (False, True, False)
    assert all(torch.equal(a, b) for a, b in zip(before, updates.parameters, strict=True))
    assert updates.schedules[0].last_epoch == 0


def test_an_update_that_is_not_finite_changes_nothing():
    updates = make()
    updates.step(micros(4), totals(), yes)
    before, state = [weight.clone() for weight in updates.parameters], copy.deepcopy(updates.state_dict())
    bad = [dataclasses.replace(row, weight=torch.nan if i == 2 else row.weight) for i, row in enumerate(ROWS)]
    broken = [dataclasses.replace(ROWS[0], logsumexp=torch.full((9,), torch.nan)), *ROWS[1:]]
    for rows in (bad, broken):
        outcome = updates.step(micros(4, rows), totals(rows), yes)
        assert not outcome.applied and not outcome.finite and outcome.whole
    assert all(torch.equal(a, b) for a, b in zip(before, updates.parameters, strict=True))
    moments = [s["optimizers"][0]["state"][0]["exp_avg"] for s in (state, updates.state_dict())]
    assert torch.equal(*moments) and updates.state_dict()["schedules"] == state["schedules"] == [1]


def test_a_gradient_that_is_not_finite_is_not_applied_though_its_loss_is():
    updates = make()
    before = [weight.clone() for weight in updates.parameters]
    hook = updates.drafter.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    outcome = updates.step(micros(4), totals(), yes)
    hook.remove()
    assert not outcome.applied and not outcome.finite and outcome.loss > 0
    assert all(torch.equal(a, b) for a, b in zip(before, updates.parameters, strict=True))


def test_running_out_of_memory_drops_the_update_and_not_the_next():
    updates = make()

    def fail():
        raise torch.OutOfMemoryError("no memory")

    outcome = updates.step([*micros(4)[:1], fail], totals(), yes)
    assert not outcome.applied and not outcome.finite
    assert updates.step(micros(4), totals(), yes).applied
    close(gradient_of(updates), expected()[1])


def test_its_state_goes_on_in_another():
    one, other = (make(warmup_updates=5, matrix_lr=1e-2) for _ in range(2))
    for _ in range(2):
        one.step(micros(4), totals(), yes)
    other.drafter.load_state_dict(one.drafter.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for updates in (one, other):
        for _ in range(2):
            updates.step(micros(4), totals(), yes)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    rates = [[schedule.get_last_lr() for schedule in updates.schedules] for updates in (one, other)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("matrix_lr", [None, 1e-2])
def test_bytes_are_counted_before_they_exist(matrix_lr):
    updates = make(matrix_lr=matrix_lr)
    counted = updates.nbytes
    updates.step(micros(8), totals(), yes)
    states = [state for o in updates.optimizers for state in o.state.values()]
    moments = sum(v.nbytes for state in states for v in state.values() if torch.is_tensor(v) and v.dim())
    assert counted == updates.nbytes == updates.flat.nbytes + moments


def test_every_row_is_in_one_update_and_a_rank_with_fewer_rows_repeats_none():
    rows = [dataclasses.replace(row, step=step) for row, step in zip(ROWS, (5, 5, 4, 5, 4, 3, 3, 2), strict=True)]
    found = batches(rows, size=3, count=4)
    assert [len(part) for part in found] == [3, 3, 2, 0]
    assert [[row.step for row in part] for part in found] == [[4, 5, 5], [3, 4, 5], [2, 3], []]
    assert [{id(row) for row in part} for part in found[:3]] == [set(map(id, rows[i : i + 3])) for i in (0, 3, 6)]
