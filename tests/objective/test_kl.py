from __future__ import annotations

import torch

from respec_trainer.objective.kl import k3


def test_k3_is_never_negative_and_its_mean_is_the_divergence():
    q, p = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    estimates = k3(p.log() - q.log())
    assert (estimates >= 0).all()
    torch.testing.assert_close((q * estimates).sum(), (q * (q.log() - p.log())).sum())


def test_k3_of_nearly_equal_probabilities_is_not_lost_in_rounding():
    """Half the square of the log-ratio, 500 times smaller than float32 can tell exp(x) - 1 from x."""
    ratio = torch.tensor([1e-4, -1e-4, 3e-4])
    torch.testing.assert_close(k3(ratio), ratio**2 / 2, rtol=2e-3, atol=0)
