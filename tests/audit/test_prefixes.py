"""audit/prefixes.py: logits after prefixes are those of each prefix by itself, from as few passes as possible."""

from __future__ import annotations

import random

import torch

from respec_trainer.audit import prefixes as module
from respec_trainer.audit.prefixes import LogitsCache, logits_after

VOCAB = 5


class Recorder:
    """A model whose logits are a function of all tokens so far; keeps the rows that it was given."""

    def __init__(self):
        self.passes: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        self.passes.append(tokens)
        return torch.stack(
            [
                self.after(row[: end + 1].tolist())
                for row, ends in zip(tokens, wanted, strict=True)
                for end in ends.nonzero()[:, 0]
            ]
        )

    def after(self, prefix) -> torch.Tensor:
        return torch.tensor([sum((i + 1) * t for i, t in enumerate(prefix)) * 10.0 + v for v in range(VOCAB)])


def test_logits_are_those_of_each_prefix_in_the_order_asked():
    whole = [tuple(random.Random(seed).choices(range(1, 4), k=9)) for seed in range(100)]
    asked = list({row[:end] for row in whole for end in (3, 4, 7, 9)})
    random.Random(0).shuffle(asked)
    model = Recorder()
    found = logits_after(asked, model, multiple_of=4)
    assert torch.equal(found, torch.stack([model.after(prefix) for prefix in asked]))
    assert all(tokens.shape[1] == 12 and len(tokens) <= module.ROWS_A_PASS for tokens in model.passes)
    assert sum(map(len, model.passes)) == len(set(whole)), "a prefix of another row took a row of its own"


def test_known_logits_are_not_computed_again():
    model = Recorder()
    cache = LogitsCache(model)
    first = cache([(1, 2), (3,)])
    assert torch.equal(cache([(3,), (1, 2)]), first.flip(0)) and len(model.passes) == 1
    mixed = cache([(2,), (1, 2), (1,)])
    assert torch.equal(mixed, torch.stack([model.after(prefix) for prefix in ((2,), (1, 2), (1,))]))
    assert model.passes[-1].tolist() == [[1], [2]]
    cache.clear()
    assert torch.equal(cache([(1, 2), (3,)]), first) and len(model.passes) == 3


def test_what_has_no_room_is_computed_again(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * VOCAB * 4)
    model = Recorder()
    cache = LogitsCache(model, multiple_of=2)
    for _ in range(2):
        assert torch.equal(cache([(1,), (2,)])[0], model.after((1,)))
        assert torch.equal(cache([(3,)])[0], model.after((3,)))
    assert len(model.passes) == 3 and model.passes[0].shape == (2, 2)
