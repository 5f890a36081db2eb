"""drafter/muon.py: orthogonal updates, equal to those of torch's own Muon up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch

from respec_trainer.drafter import muon
from respec_trainer.drafter.muon import Muon, orthogonal


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def quick(request, monkeypatch) -> bool:
    monkeypatch.setattr(muon, "bf16_is_quick", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_come_near_one_and_directions_stay(quick, shape):
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    found = orthogonal(((left * torch.linspace(0.1, 3, len(right))) @ right).float())
    # The iteration's own band is 0.7 to 1.2; bf16 keeps 8 bits of matrices of norm 1.
    inside = left.T @ found.double() @ right.T
    values = inside.diagonal()
    assert found.dtype == torch.float32 and values.min() > 0.65 and values.max() < 1.25
    assert (inside - values.diag()).abs().max() < (0.05 if quick else 1e-4)


def test_it_steps_as_torch_does(quick):
    """torch iterates in bf16. Both orthogonalize the same averages, so they differ only by that rounding."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8))]
    ours, theirs = ([weight.clone().requires_grad_() for weight in start] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for weight in pair:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < (1e-6 if quick else 2e-2) * moved


def test_it_goes_on_from_its_state(quick):
    weights = [torch.eye(4).requires_grad_() for _ in range(2)]
    first, second = (Muon([weight], lr=0.1) for weight in weights)
    gradients = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    for gradient in gradients[:2]:
        weights[0].grad = gradient.clone()
        first.step()
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for weight, optimizer in zip(weights, (first, second), strict=True):
        weight.grad = gradients[2].clone()
        optimizer.step()
    assert torch.equal(*weights)


def test_what_has_no_gradient_stays_and_vectors_are_refused():
    weight = torch.ones(2, 3, requires_grad=True)
    Muon([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"for matrices, not for parameters of shape \(3,\)"):
        Muon([torch.ones(3, requires_grad=True)], lr=0.1)
