from __future__ import annotations

import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.aggregation import token_weights

MASK = torch.tensor([[False, True, True, True], [False, False, True, False]])


def test_token_weights_count_every_token_alike():
    weights = token_weights(MASK, tokens=4.0, sequences=2.0, config=ObjectiveConfig(aggregation="token"))
    assert torch.equal(weights, MASK / 4)


def test_sequence_weights_count_every_response_alike():
    weights = token_weights(MASK, tokens=4.0, sequences=2.0, config=ObjectiveConfig(aggregation="sequence"))
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.5, 0.5]))
    assert weights[1, 2] == 0.5


def test_an_empty_response_has_no_weight():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for aggregation in ("token", "sequence"):
        weights = token_weights(mask, tokens=1.0, sequences=1.0, config=ObjectiveConfig(aggregation=aggregation))
        assert torch.equal(weights, torch.zeros(2, 3))
